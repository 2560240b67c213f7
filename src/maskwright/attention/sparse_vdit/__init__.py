"""Room: Sparse-vDiT."""

from maskwright.attention.sparse_vdit.method import SparseVDiT as SparseVDiT
from maskwright.attention.sparse_vdit.search import profile as profile
from maskwright.attention.sparse_vdit.search import search as search
