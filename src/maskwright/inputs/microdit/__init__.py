"""Room: micro-diffusion."""

from maskwright.inputs.microdit.deferred import DeferredMask as DeferredMask
from maskwright.inputs.microdit.method import MicroDit as MicroDit
