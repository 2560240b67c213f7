"""Seeded noise added to a row under a mask in one pass: the noise is never stored. Its twin is torch, piece by piece."""

from maskwright.kernels.noise.ops import fits as fits
from maskwright.kernels.noise.ops import load as load
from maskwright.kernels.noise.ops import move as move
