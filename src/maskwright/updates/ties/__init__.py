"""Room: TIES-Merging."""

from maskwright.updates.ties.method import Ties as Ties
