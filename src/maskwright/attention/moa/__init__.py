"""MoA."""

from maskwright.attention.moa.method import Moa as Moa
