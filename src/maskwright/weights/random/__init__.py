"""Random pruning."""

from maskwright.weights.random.method import Random as Random
