"""A small masked-diffusion language model: hidden characters are guessed from both sides, a few at each step.

Half its training rows are real text, half key-value retrieval prompts whose answer the model writes behind the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.lab import models, text
from maskwright.lab import train as loop
from maskwright.lab.made import Recipe, topics_data

LENGTH, PAIRS, QUERIES = 256, 20, 16
CONTEXT, ANSWER = 128, 4 * QUERIES  # a prompt is CONTEXT + ANSWER characters: the pairs, then the questions
PROMPT = CONTEXT + ANSWER
Tell = Callable[..., object]


class RotaryAttention(models.Attention):
    """The lab's attention with rotary positions on a half of each head; `attend` stays replaceable.

    The other half matches contents whatever their distance.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__(width, heads, causal=False)
        half = width // heads // 4
        angle = torch.outer(torch.arange(length).float(), 1000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cosine", angle.cos(), persistent=False)  # (length, head width / 4)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.query, self.key, self.value)
        query, key, value = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in maps)
        mixed = self.attend(self.turn(query), self.turn(key), value, False)  # (batch, heads, length, width / heads)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def turn(self, x: Tensor) -> Tensor:
        """Rotate half of (batch, heads, length, width) by its positions: q k' then depends on their distance only."""
        first, second, rest = x.split([self.cosine.shape[1], self.cosine.shape[1], x.shape[-1] // 2], -1)
        cosine, sine = self.cosine[: x.shape[2]], self.sine[: x.shape[2]]
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine, rest], -1)


class MaskedLM(nn.Module):
    """Bidirectional character model: (batch, length) int64, `mask` where hidden -> logits (batch, length, vocabulary)."""

    def __init__(
        self, vocabulary: int, *, layers: int = 4, width: int = 128, heads: int = 8, length: int = LENGTH, seed: int = 0
    ) -> None:
        super().__init__()
        if width % (4 * heads):
            raise ValueError(f"half rotary heads need a width of 4, 8, ... each: {width} over {heads} heads")
        self.length, self.mask = length, vocabulary
        with models.seeded(seed):
            self.inlet = nn.Embedding(vocabulary + 1, width)
            self.near = nn.Conv1d(width, width, 5, padding=2, groups=width)  # a value knows its key
            self.blocks = nn.ModuleList(models.Block(width, heads, causal=False, activation=nn.GELU) for _ in range(layers))
            for block in self.blocks:
                block.attention = RotaryAttention(width, heads, length)
            self.norm = nn.LayerNorm(width)
            nn.init.normal_(self.inlet.weight, std=width**-0.5)
            nn.init.normal_(self.near.weight)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=width**-0.5 / 2)
                    nn.init.zeros_(module.bias)
            for module in self.modules():
                if isinstance(module, models.Attention):
                    _like_reads_like(module)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[-1] > self.length:
            raise ValueError(f"{ids.shape[-1]} characters do not fit a length of {self.length}")
        hidden = self.inlet(ids) * self.inlet.weight.shape[1] ** 0.5
        hidden = hidden + self.near(hidden.mT).mT
        for block in self.blocks:
            hidden = block(hidden)
        return F.linear(self.norm(hidden), self.inlet.weight[:-1])


@torch.no_grad()
def _like_reads_like(attention: models.Attention) -> None:
    """Start from attention that reads places of like content and hands on what stands there.

    Matching a key takes a model this small thousands of steps to find by itself, and about a hundred from here.
    """
    width = attention.query.in_features
    nn.init.normal_(attention.query.weight, std=0.7 * width**-0.5)
    nn.init.normal_(attention.value.weight, std=width**-0.5)
    attention.key.weight.copy_(attention.query.weight)
    attention.out.weight.copy_(attention.value.weight.T)


@torch.no_grad()
def generate(model: MaskedLM, prompt: Tensor, new: int, steps: int, *, tell: Tell | None = None) -> Tensor:
    """Append `new` characters to `prompt` (batch, length) in `steps` denoising steps; gives (batch, new) int64.

    All new places start hidden; each step fills the most certain ones with their likeliest character (no chance in
    it), as LLaDA's low-confidence remasking at temperature 0. `tell(step=, steps=, new_tokens=)` is called before
    every step. Raises ValueError for more steps than new places.
    """
    if not 1 <= steps <= new:
        raise ValueError(f"{new} new characters need 1 to {new} steps, not {steps}")
    batch, start = prompt.shape
    ids = torch.cat([prompt, prompt.new_full((batch, new), model.mask)], 1)
    for step in range(steps):
        if tell is not None:
            tell(step=step, steps=steps, new_tokens=new)
        chance, guess = model(ids)[:, start:].softmax(-1).max(-1)  # (batch, new)
        hidden = ids[:, start:] == model.mask
        count = new * (step + 1) // steps - new * step // steps
        chosen = chance.masked_fill(~hidden, -1.0).sort(dim=1, descending=True, stable=True).indices[:, :count]
        ids.scatter_(1, start + chosen, guess.gather(1, chosen))
    return ids[:, start:]


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Key-value prompts: `prompt` (rows, PROMPT), the right `answer` (rows, ANSWER), and where its `values` stand."""

    prompt: Tensor
    answer: Tensor
    values: Tensor


def retrieval(
    chars: text.Chars, source: Tensor, rows: int, generator: torch.Generator, *, pairs: int = PAIRS,
    slots: int = CONTEXT // 4,
) -> Retrieval:  # fmt: skip
    """`pairs` pairs `k=V;` scattered in a piece of real text, then QUERIES questions `k=?;`; the answer says `k=V;`.

    source: (length,) numbers of the text the filling is cut from, `chars.train` or `chars.val`; pairs and filling take
    `slots` places of 4 characters. Keys are distinct small letters, values capitals. With fewer pairs than QUERIES some are
    asked for again.
    """
    small, capital, signs = (chars.encode(s) for s in ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "=;?"))
    keys = small[torch.rand(rows, 26, generator=generator).argsort(1)[:, :pairs]]
    values = capital[torch.randint(26, (rows, pairs), generator=generator)]
    records = torch.stack([keys, signs[0].expand_as(keys), values, signs[1].expand_as(keys)], -1)  # (rows, pairs, 4)
    filling = slots - pairs
    starts = torch.randint(len(source) - 4 * filling, (rows, 1), generator=generator)
    words = source[starts + torch.arange(4 * filling)].unflatten(1, (filling, 4))
    place = torch.rand(rows, slots, generator=generator).argsort(1)
    place[:, pairs:] = place[:, pairs:].sort(1).values  # the text keeps its order around the pairs
    context = torch.empty(rows, slots, 4, dtype=torch.int64)
    context.scatter_(1, place[..., None].expand(-1, -1, 4), torch.cat([records, words], 1))
    asked = torch.rand(rows, max(pairs, QUERIES), generator=generator).argsort(1)[:, :QUERIES, None] % pairs
    answer = records.gather(1, asked.expand(-1, -1, 4))
    questions = answer.clone()
    questions[..., 2] = signs[2]
    prompt = torch.cat([context.flatten(1), questions.flatten(1)], 1)
    return Retrieval(prompt, answer.flatten(1), torch.arange(QUERIES) * 4 + 2)


def hidden_rows(
    rows: Tensor, first: int, mask: int, generator: torch.Generator, share: float | None = None
) -> tuple[Tensor, Tensor]:
    """Hide a share u ~ U(0, 1) of each row's characters from `first` on: (x with `mask`, y with -1 where seen).

    Exactly ceil(u length) are hidden, so that the weight 1/u of the loss is its mean over the hidden ones. `share`
    fixes u for all rows.
    """
    count, length = rows.shape[0], rows.shape[1] - first
    drawn = torch.rand(count, 1, generator=generator) if share is None else torch.full((count, 1), share)
    wanted = (drawn * length).ceil().clamp(min=1)
    order = torch.rand(count, length, generator=generator).argsort(1).argsort(1)
    hide = torch.cat([torch.zeros(count, first, dtype=torch.bool), order < wanted], 1)
    return rows.masked_fill(hide, mask), rows.masked_fill(~hide, -1)


def denoising_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of hidden characters with weight 1/u: the mean over a row's hidden ones, then over rows (nats)."""
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=-1, reduction="none").view_as(target)
    return (loss.sum(1) / (target >= 0).sum(1)).mean()


def text_rows(ids: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Random windows (rows, LENGTH) of a text."""
    starts = torch.randint(len(ids) - LENGTH + 1, (rows, 1), generator=generator)
    return ids[starts + torch.arange(LENGTH)]


def lessons(chars: text.Chars, mask: int, steps: int) -> loop.Draw:
    """Draw batches for `steps` steps: x with hidden characters, y with -1 where seen.

    A whole batch is half text, hidden anywhere, and half retrieval, of which every other row hides its values alone. In
    the first 0.4 two of three batches are short lessons: only values hidden, behind 4 and later 12 pairs, without
    questions, so that a model this small comes to read the pairs within minutes.
    """
    drawn = 0

    def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        nonlocal drawn
        drawn += 1
        along = drawn / steps
        if along <= 0.4 and drawn % 3:
            pairs, slots = (4, 6) if along <= 0.2 else (12, 18)
            asked = retrieval(chars, chars.train, 2 * batch, generator, pairs=pairs, slots=slots)
            return _values_hidden(asked.prompt[:, : 4 * slots], asked, mask, generator)
        plain = hidden_rows(text_rows(chars.train, batch // 2, generator), 0, mask, generator)
        asked = retrieval(chars, chars.train, batch - batch // 2, generator)
        told = hidden_rows(torch.cat([asked.prompt, asked.answer], 1), PROMPT, mask, generator)
        short = _values_hidden(asked.prompt, asked, mask, generator)
        for whole, values in zip(told, short, strict=True):
            whole[1::2] = values[1::2]
        return torch.cat([plain[0], told[0]]), torch.cat([plain[1], told[1]])

    return draw


def _values_hidden(before: Tensor, asked: Retrieval, mask: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The answers behind `before`, a share of their values hidden."""
    x = torch.cat([before, asked.answer], 1)
    y, at = torch.full_like(x, -1), before.shape[1] + asked.values
    x[:, at], y[:, at] = hidden_rows(asked.answer[:, asked.values], 0, mask, generator)
    return x, y


def masked_lm(seed: int) -> nn.Module:
    """4 layers, width 128, 8 heads, length 256, rotary positions: 0.8 M parameters."""
    return MaskedLM(len(text.python_chars().vocabulary), seed=seed)


def fit_masked_lm(model: MaskedLM, seed: int, steps: int, progress: Callable[[int, float], None] | None) -> dict[str, float]:
    """Train on the help topics and retrieval prompts; measure both on held-out text."""
    chars = text.python_chars()
    train_loss = loop.train(
        model, lessons(chars, model.mask, steps), steps=steps, batch=8, lr=3e-3, optimizer="adamw",
        weight_decay=0.05, warmup=max(1, steps // 20), clip=1.0, seed=seed, on_step=progress, loss_fn=denoising_loss,
    )  # fmt: skip
    return {"train_loss": train_loss, "val_loss": text_loss(model), "retrieval": retrieved(model)}


def text_loss(model: MaskedLM, rows: int = 64, seed: int = 0) -> float:
    """Denoising cross entropy (nats a hidden character) on held-out text, the same hidden places for every model."""
    generator = torch.Generator().manual_seed(seed)
    x, y = hidden_rows(text_rows(text.python_chars().val, rows, generator), 0, model.mask, generator)
    return loop.loss_of(model, x, y, batch=16, loss_fn=denoising_loss)


def retrieved(model: MaskedLM, rows: int = 16, steps: int = 16, seed: int = 0) -> float:
    """Share of right values when answers to held-out prompts are generated in `steps` steps."""
    chars = text.python_chars()
    asked = retrieval(chars, chars.val, rows, torch.Generator().manual_seed(seed))
    return right(asked, generate(model.eval(), asked.prompt, ANSWER, steps))


def right(asked: Retrieval, guess: Tensor) -> float:
    """Share of the asked values that `guess` (rows, ANSWER) has right."""
    return float((guess == asked.answer)[:, asked.values].double().mean())


_CODE = (models, loop, sys.modules[__name__])
RECIPES: dict[str, Recipe] = {
    "masked_lm": Recipe("masked-diffusion character LM", masked_lm, fit_masked_lm, topics_data, 900, _CODE),
}
