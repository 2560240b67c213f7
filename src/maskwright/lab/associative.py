"""Associative recall in embeddings: pairs spread over filler, asked for at the end; and small nets that can answer.

A pair is one token that carries a key and a value, so that a single attention layer can answer a question, and what an
attention mask costs shows after few steps. On characters the like needs several layers: that is lab/recall.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskwright.lab.models import Attend, Transformer, dense_attention, seeded
from maskwright.lab.train import Draw

IGNORE = -100  # the target of a token that answers nothing; cross_entropy leaves it out


@dataclass(frozen=True)
class Recall:
    """`pairs` pairs at chance places among filler, then `questions` of them, all in one row of `length` tokens.

    A token is two numbers, (word, value). Words are 0 .. keys - 1, then the filler; value 0 is none, 1 .. values are
    answers. A pair is (key, value), filler (word, 0), a question (key, 0), whose answer is value - 1.
    Keys of a row differ. Raises ValueError for sizes that do not fit.
    """

    length: int = 128
    pairs: int = 16
    questions: int = 16
    keys: int = 64
    values: int = 16
    filler: int = 32

    def __post_init__(self) -> None:
        if self.pairs + self.questions > self.length or not 1 <= self.questions <= self.pairs <= self.keys:
            raise ValueError(f"a row of {self.length} tokens and {self.keys} keys cannot hold {self}")

    @property
    def words(self) -> int:
        return self.keys + self.filler

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, length, 2) int64; y (n, length) int64, IGNORE where nothing is asked; at (n, questions) int64, where the
        asked pair stands."""
        room, rows = self.length - self.questions, torch.arange(n)[:, None]
        where = _some(n, room, self.pairs, rng)
        key = _some(n, self.keys, self.pairs, rng)
        value = torch.randint(self.values, (n, self.pairs), generator=rng)
        asked = _some(n, self.pairs, self.questions, rng)
        word = torch.randint(self.keys, self.words, (n, self.length), generator=rng)
        what = torch.zeros_like(word)
        word[rows, where], what[rows, where] = key, value + 1
        word[:, room:] = key.gather(1, asked)
        y = torch.full_like(word, IGNORE)
        y[:, room:] = value.gather(1, asked)
        return torch.stack([word, what], -1), y, where.gather(1, asked)

    def draw(self) -> Draw:
        """Fresh rows for `lab.train.train`."""

        def drawn(batch: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
            x, y, _ = self.sample(batch, rng)
            return x, y

        return drawn


def _some(n: int, of: int, many: int, rng: torch.Generator) -> Tensor:
    """(n, many): so many different numbers below `of` in chance order, a row each."""
    return torch.rand(n, of, generator=rng).argsort(1)[:, :many]


class Shared(nn.Module):
    """Multi-head attention whose heads share fewer key heads; `attend` may be replaced by another attention function."""

    def __init__(self, width: int, heads: int, kv_heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, width // heads * kv_heads) for _ in range(2))
        self.attend: Attend = _grouped

    def forward(self, x: Tensor) -> Tensor:
        maps = ((self.query, self.heads), (self.key, self.kv_heads), (self.value, self.kv_heads))
        query, key, value = (m(x).unflatten(-1, (heads, -1)).transpose(1, 2) for m, heads in maps)
        return self.out(self.attend(query, key, value, self.causal).transpose(1, 2).flatten(2))


def _grouped(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    share = query.shape[1] // key.shape[1]
    return dense_attention(query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), causal)


class _Inlet(nn.Module):
    """(batch, length, 2) numbers -> the sum of a word's and a value's embedding (none has one of its own)."""

    def __init__(self, task: Recall, width: int) -> None:
        super().__init__()
        self.word, self.what = nn.Embedding(task.words, width), nn.Embedding(task.values + 1, width)
        for table in (self.word, self.what):
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.word(x[..., 0]) + self.what(x[..., 1])


class RecallNet(Transformer):
    """A causal transformer that answers `task`: (batch, length, 2) -> logits (batch, length, values)."""

    def __init__(
        self, task: Recall, *, layers: int = 1, width: int = 64, heads: int = 4, kv_heads: int = 0, seed: int = 0
    ) -> None:
        with seeded(seed):
            super().__init__(
                _Inlet(task, width), task.length, layers, width, heads, task.values, causal=True, activation=nn.GELU
            )
            if kv_heads:
                for block in self.blocks:
                    block.attention = Shared(width, heads, kv_heads, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.inlet(x)))


@torch.no_grad()
def right(model: nn.Module, task: Recall, n: int, *, seed: int, batch: int = 250) -> tuple[Tensor, Tensor]:
    """hit (n, questions) bool: which answers are right; far (n, questions) int64: how many tokens back the pair stands."""
    rng = torch.Generator().manual_seed(seed)
    hits, back = [], []
    was_training = model.training
    model.eval()
    for first in range(0, n, batch):
        x, y, at = task.sample(min(batch, n - first), rng)
        asked = slice(task.length - task.questions, None)
        hits.append(model(x)[:, asked].argmax(-1) == y[:, asked])
        back.append(torch.arange(task.length)[asked] - at)
    model.train(was_training)
    return torch.cat(hits), torch.cat(back)
