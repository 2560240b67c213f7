"""Room: S2-Attention."""

from maskwright.attention.s2_attention.grid import kv_efficient as kv_efficient
from maskwright.attention.s2_attention.method import S2Attention as S2Attention
