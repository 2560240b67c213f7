"""OWL."""

from maskwright.weights.owl.method import Owl as Owl
