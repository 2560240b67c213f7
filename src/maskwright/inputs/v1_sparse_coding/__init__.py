"""Room: V1 sparse coding."""

from maskwright.inputs.v1_sparse_coding.method import V1SparseCoding as V1SparseCoding
