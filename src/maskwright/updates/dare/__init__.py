"""Room: DARE."""

from maskwright.updates.dare.method import Dare as Dare
