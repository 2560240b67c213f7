"""SR-STE."""

from maskwright.weights.sr_ste.method import SrSte as SrSte
