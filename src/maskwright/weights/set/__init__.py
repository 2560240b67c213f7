"""SET."""

from maskwright.weights.set.method import Set as Set
