"""Room: l1 sparse coding, the baseline."""

from maskwright.inputs.l1_coding.method import L1Coding as L1Coding
