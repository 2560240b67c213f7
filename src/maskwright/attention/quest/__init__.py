"""Room: Quest."""

from maskwright.attention.quest.method import Quest as Quest
