"""Magnitude pruning."""

from maskwright.weights.magnitude.method import Magnitude as Magnitude
