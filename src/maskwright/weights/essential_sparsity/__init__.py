"""Essential sparsity."""

from maskwright.weights.essential_sparsity.method import EssentialSparsity as EssentialSparsity
