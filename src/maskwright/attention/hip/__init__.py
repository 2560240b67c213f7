"""HiP."""

from maskwright.attention.hip.method import Hip as Hip
