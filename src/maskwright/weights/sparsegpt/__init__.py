"""SparseGPT."""

from maskwright.weights.sparsegpt.method import SparseGpt as SparseGpt
