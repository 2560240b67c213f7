"""Masks on attention: plans of keys, one engine to attend with, methods that plan, and their use on models."""

from maskwright.attention.apply import use
from maskwright.attention.attend import attend
from maskwright.attention.huggingface import register_when_loaded
from maskwright.attention.method import AttentionMethod
from maskwright.attention.plan import KeyPlan
from maskwright.attention.run import Record, Run
from maskwright.attention.site import AttentionSite, ModelShape, State
from maskwright.attention.structure import Anywhere, Causal, Document, Padding, Prefix, Rows, Sink, Structure, Window
from maskwright.kernels.block_attention import Pieces, choose

__all__ = [
    "Anywhere",
    "AttentionMethod",
    "AttentionSite",
    "Causal",
    "Document",
    "KeyPlan",
    "ModelShape",
    "Padding",
    "Pieces",
    "Prefix",
    "Record",
    "Rows",
    "Run",
    "Sink",
    "State",
    "Structure",
    "Window",
    "attend",
    "choose",
    "use",
]

register_when_loaded()
