"""Chains of blocks from settings: layer-wise scaling, every second block expert choice, and how the weights start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from maskwright.core.errors import BadInput
from maskwright.inputs.microdit.dit import Attention, Block
from maskwright.inputs.microdit.ffn import Experts, SwiGlu


def scaled(ends: tuple[float, float], depth: int) -> list[Fraction]:
    """Layer-wise scaling: `depth` multipliers on a line between the ends, exact; a single block takes the last."""
    low, high = (Fraction(repr(float(end))) for end in ends)
    return [low + (high - low) * layer / (depth - 1) if depth > 1 else high for layer in range(depth)]


def inner(width: int, scale: Fraction, head: int) -> int:
    """Width of a scaled block's attention: rounded up to a multiple of two heads; the whole width at scale 1."""
    return width if scale == 1 else -(-int(width * scale) // (2 * head)) * 2 * head


@dataclass(frozen=True)
class Parts:
    """What all blocks share. condition: width of the condition and of its tokens; crossed: there are tokens to read.

    experts: 0 for none; every `every`-th block has them.
    """

    head: int
    multiple: int
    condition: int
    crossed: bool
    experts: int
    capacity: float
    every: int

    def blocks(
        self, width: int, attention: Sequence[Fraction], ffn: Sequence[Fraction], out: Sequence[float], experts_before: int
    ) -> Iterator[Block]:
        """One block for each multiplier; `out` is the standard deviation of its residual outputs at width 1024.

        Blocks from `experts_before` on have no experts. Raises BadInput for a width that the head width does not divide.
        Differs: the code starts every weight at .02 whatever the width; ours start at .02 sqrt(1024 / width), the same at
        the paper's width, and as large in effect at a small one.
        """
        if width % self.head:
            raise BadInput(f"a width of {width} is no multiple of the head width {self.head}")
        wide = (1024 / width) ** 0.5
        for layer, (inside, hidden, std) in enumerate(zip(attention, ffn, out, strict=True)):
            size = inner(width, inside, self.head)
            chosen = self.experts > 0 and (layer + 1) % self.every == 0 and layer < experts_before
            block = Block(
                width,
                Attention(width, size, size // self.head),
                Attention(width, width, width // self.head, self.condition) if self.crossed else None,
                Experts(width, width * hidden, self.multiple, self.experts, self.capacity)
                if chosen
                else SwiGlu(width, width * hidden, self.multiple),
                self.condition,
            )
            for part in (block.attention, block.cross, block.ffn):
                if part is not None:
                    part.start(0.02 * wide, std * wide)
            yield block
