"""Sparse coding past l1: a dictionary of image patches whose code is cut by a threshold nearer to l0."""

from dataclasses import dataclass
from typing import final

from maskwright.core.errors import BadInput
from maskwright.inputs import Coding, Proximal
from maskwright.inputs.proximal import CATALOGUE, penalty


@final
@dataclass(frozen=True)
class V1SparseCoding(Coding):
    """min 1/2 ||x - D a||^2 + penalty(a) with a penalty from the catalogue (arXiv 2301.10002; PLOS Comput Biol 2023).

    Codes by proximal gradient from 0: a <- prox(a - D^T (D a - x) / ||D||^2). l1 makes every coefficient smaller, so it
    needs more of them for the same error; l0 and its relatives leave large ones as they are. CEL0 has l0's best
    solutions, and gets away from a = 0 where l0's threshold stays. The support of a code is the mask.

    penalty: a name in CATALOGUE. q: of "lq". bend: of "mcp" and "scad"; None is their own default. The rest as in Coding.
    """

    penalty: str = "cel0"
    q: float = 2 / 3
    bend: float | None = None

    @property
    def operator(self) -> Proximal:
        if self.penalty == "top_k" or self.penalty not in CATALOGUE:
            known = ", ".join(name for name in CATALOGUE if name != "top_k")
            raise BadInput(f"no penalty {self.penalty!r} with a strength lam; known: {known}")
        own: dict[str, float] = {}
        if self.penalty == "lq":
            own["q"] = self.q
        if self.penalty in ("mcp", "scad") and self.bend is not None:
            own["bend"] = self.bend
        return penalty(self.penalty, non_negative=self.non_negative, lam=self.lam, **own)
