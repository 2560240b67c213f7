"""Wanda."""

from maskwright.weights.wanda.method import Wanda as Wanda
