"""Room: block-sparse."""

from maskwright.attention.block_sparse.method import BlockSparse as BlockSparse
