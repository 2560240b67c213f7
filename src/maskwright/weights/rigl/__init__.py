"""RigL."""

from maskwright.weights.rigl.method import RigL as RigL
