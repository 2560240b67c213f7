"""Room: LT-SFT."""

from maskwright.updates.lt_sft.method import LtSft as LtSft
