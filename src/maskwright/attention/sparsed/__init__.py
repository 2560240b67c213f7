"""Room: SparseD."""

from maskwright.attention.sparsed.method import SparseD as SparseD
