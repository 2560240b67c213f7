"""Masks on weights: find sites, prune in one shot, train under a mask, attach, bake."""

from maskwright.core.gate import hard, ste
from maskwright.kernels.packed_linear import PackedLinear
from maskwright.weights.accelerated import Acceleration, accelerate
from maskwright.weights.apply import attach, bake
from maskwright.weights.oneshot import ByScore, OneShot
from maskwright.weights.scores import input_weighted
from maskwright.weights.sites import WeightSite, sites
from maskwright.weights.solve import Rule, Solved
from maskwright.weights.train import MaskedTraining, Run, training

__all__ = [
    "Acceleration",
    "ByScore",
    "MaskedTraining",
    "OneShot",
    "PackedLinear",
    "Rule",
    "Run",
    "Solved",
    "WeightSite",
    "accelerate",
    "attach",
    "bake",
    "hard",
    "input_weighted",
    "sites",
    "ste",
    "training",
]
