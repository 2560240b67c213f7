"""A small multilingual encoder, trained by masked LM on the installation guides' training sections.

One subword vocabulary over all languages (byte-level BPE), a Transformer of the lab's blocks, the output tied to the
embedding, which starts from the tokens' company (the singular vectors of their mutual information). Some languages
are seen at a hundredth of the rows only: those whose language deltas are tried in claims.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.core.errors import BadInput
from maskwright.lab import guides, models
from maskwright.lab import train as loop
from maskwright.lab.made import Recipe

VOCABULARY, WIDTH, LENGTH = 8192, 128, 64
HIDDEN = 13  # tokens of a full row that masked LM hides: a fifth
PAD, CLS, SEP, MASK = range(4)
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
ENGLISH, RARE = 0.16, {"da": 0.01, "pt": 0.01, "cs": 0.01}  # shares of the rows; the other languages share the rest
Batch = tuple[Tensor, Tensor]


@cache
def tokenizer() -> Any:
    """The byte-level BPE of all languages' training sections: 8,192 tokens, the same in every run.

    Raises SourceMissing without the guides.
    """
    return fit_tokenizer([s.heading + "\n" + s.text for name in guides.LANGUAGES for s in guides.side(name, "train")])


def fit_tokenizer(texts: Sequence[str], size: int = VOCABULARY) -> Any:
    """A byte-level BPE of `size` tokens, SPECIAL first. It knows every text: a byte is a token."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
    from tokenizers import models as kinds

    made = Tokenizer(kinds.BPE())
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


class Encoder(nn.Module):
    """(batch, length <= `length`) int64, PAD where nothing stands -> hidden states (batch, length, width)."""

    def __init__(
        self, vocabulary: int = VOCABULARY, *, layers: int = 4, width: int = WIDTH, heads: int = 4, length: int = LENGTH,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.length, self.seen = length, _Seen()
        with models.seeded(seed):
            self.inlet = nn.Embedding(vocabulary, width)
            self.positions = nn.Parameter(0.02 * torch.randn(length, width))
            self.blocks = nn.ModuleList(models.Block(width, heads, causal=False, activation=nn.GELU) for _ in range(layers))
            self.norm, self.bias = nn.LayerNorm(width), nn.Parameter(torch.zeros(vocabulary))
            nn.init.normal_(self.inlet.weight, std=width**-0.5)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=width**-0.5 / 2)
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, models.Attention):
                module.attend = self.seen

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[-1] > self.length:
            raise BadInput(f"{ids.shape[-1]} tokens do not fit a length of {self.length}")
        self.seen.mask = None if bool((ids != PAD).all()) else (ids != PAD)[:, None, None]
        hidden = self.inlet(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)

    def guess(self, ids: Tensor, where: Tensor) -> Tensor:
        """Logits (batch, n, vocabulary) of the tokens at `where` (batch, n): only those are worth computing."""
        hidden = self(ids)
        at = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))
        return F.linear(at, self.inlet.weight, self.bias)


class _Seen:
    """Attention to the tokens that are no padding; one object for all blocks of an encoder."""

    mask: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


class MaskedLM(nn.Module):
    """The encoder behind one input, as the lab's training loop calls it: x holds (ids, where)."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Batch) -> Tensor:
        return self.encoder.guess(*x)


class Reader(nn.Module):
    """The encoder with a linear head on the mean of its tokens: ids (batch, length) -> (batch, outputs).

    `first` limits the mean to that many places: of a pair, those where the query stands.
    """

    def __init__(self, encoder: Encoder, outputs: int, *, first: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.encoder, self.first = encoder, first
        with models.seeded(seed):
            self.head = nn.Linear(encoder.inlet.embedding_dim, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, real = self.encoder(ids)[:, : self.first], (ids != PAD)[:, : self.first, None]
        return self.head((hidden * real).sum(1) / real.sum(1))


def token_ids(texts: Sequence[str], length: int = LENGTH) -> Tensor:
    """(texts, length) int64: CLS, then the text's first tokens, PAD behind."""
    rows = [[CLS, *found.ids[: length - 1]] for found in tokenizer().encode_batch(list(texts))]
    return padded(rows, length)


def padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """(rows, length) int64 of token lists, PAD behind."""
    return torch.tensor([[*row, *[PAD] * (length - len(row))] for row in rows], dtype=torch.int64).view(-1, length)


@cache
def stream(language: str, side: str = "train") -> Tensor:
    """(tokens,) of one side's headings and paragraphs, SEP after each."""
    texts = [text for s in guides.side(language, side) for text in (s.heading, *s.paragraphs)]
    return torch.tensor([i for found in tokenizer().encode_batch(texts) for i in (*found.ids, SEP)], dtype=torch.int64)


def shares() -> dict[str, float]:
    """Share of each language in the training of the base: they sum to 1."""
    rest = [name for name in guides.LANGUAGES if name != "en" and name not in RARE]
    each = (1 - ENGLISH - sum(RARE.values())) / len(rest)
    return {name: RARE.get(name, ENGLISH if name == "en" else each) for name in guides.LANGUAGES}


def masked_rows(streams: Mapping[str, Tensor], share: Mapping[str, float], length: int = LENGTH) -> loop.Draw:
    """Draw masked-LM batches ((ids, where), what stood there); every row is of one language, drawn by its share.

    Of the places to guess eight in ten are hidden behind MASK, one holds a token drawn by chance, one is left as it is.
    """
    names, weights = list(share), torch.tensor(list(share.values()))
    hidden = max(1, round(length * HIDDEN / LENGTH))

    def draw(batch: int, generator: torch.Generator) -> tuple[Any, Tensor]:
        rows = []
        for index in torch.multinomial(weights, batch, replacement=True, generator=generator).tolist():
            ids = streams[names[index]]
            start = int(torch.randint(len(ids) - length + 2, (), generator=generator))
            rows.append(ids[start : start + length - 1])
        ids = F.pad(torch.stack(rows), (1, 0), value=CLS)
        where = 1 + torch.rand(batch, length - 1, generator=generator).argsort(1)[:, :hidden]
        target = ids.gather(1, where)
        fate = torch.rand(where.shape, generator=generator)
        chance = torch.randint(len(SPECIAL), VOCABULARY, where.shape, generator=generator)
        shown = torch.where(fate < 0.8, MASK, torch.where(fate < 0.9, chance, target))
        return (ids.scatter(1, where, shown), where), target

    return draw


def language_rows(language: str, side: str = "train") -> loop.Draw:
    """Masked-LM batches of one language: what a language delta is trained on."""
    return masked_rows({language: stream(language, side)}, {language: 1.0})


@torch.no_grad()
def masked_loss(encoder: Encoder, language: str, side: str = "val", rows: int = 64, seed: int = 0) -> float:
    """Mean cross entropy (nats a hidden token), on the same rows and places for every model."""
    (ids, where), target = language_rows(language, side)(rows, torch.Generator().manual_seed(seed))  # type: ignore[misc]
    was_training = encoder.training
    encoder.eval()
    loss = float(loop.cross_entropy(encoder.guess(ids, where), target))
    encoder.train(was_training)
    return loss


def word_vectors(streams: Sequence[Tensor], vocabulary: int, width: int, seed: int = 0) -> Tensor:
    """(vocabulary, width): the leading singular vectors of the tokens' positive pointwise mutual information.

    A pair counts 1 / distance up to 5 places apart. From here masked LM needs a fraction of the steps that it needs from
    chance. Tokens that never occur get small vectors by chance.
    """
    counts = torch.zeros(vocabulary * vocabulary)
    for ids in streams:
        for back in range(1, 6):
            pairs, often = (ids[:-back] * vocabulary + ids[back:]).unique(return_counts=True)
            counts[pairs] += often / back
    table = counts.view(vocabulary, vocabulary)
    table = table + table.T
    rows = table.sum(1).clamp(min=1e-9)
    smooth = rows**0.75  # as in word2vec: rare tokens are no one's best neighbours
    information = (table / rows[:, None] / (smooth / smooth.sum())).clamp(min=1).log()
    with models.seeded(seed):
        left, size, _ = torch.svd_lowrank(information, q=width + 32, niter=2)
        vectors = left[:, :width] * size[:width].sqrt()
        vectors = vectors * width**-0.5 / vectors.std()
        return torch.where(vectors.norm(dim=1, keepdim=True) > 1e-3, vectors, 0.02 * torch.randn_like(vectors))


def guide_encoder(seed: int) -> nn.Module:
    """4 layers, width 128, 8,192 tokens: 1.9 M parameters."""
    return Encoder(seed=seed)


def fit_guide_encoder(
    model: Encoder, seed: int, steps: int, progress: Callable[[int, float], None] | None
) -> dict[str, float]:
    """Train by masked LM on all languages' training sections; measure on the validation sections of a few."""
    streams, share = {name: stream(name) for name in guides.LANGUAGES}, shares()
    usual = min(share[name] for name in guides.LANGUAGES if name not in RARE)
    seen = [ids[: int(len(ids) * min(1.0, share[name] / usual))] for name, ids in streams.items()]  # less of the rare ones
    with torch.no_grad():
        model.inlet.weight.copy_(word_vectors(seen, len(model.bias), model.inlet.embedding_dim, seed))
    draw = masked_rows(streams, share)
    train_loss = loop.train(
        MaskedLM(model), draw, steps=steps, batch=16, lr=2e-3, optimizer="adamw", weight_decay=0.01,
        warmup=max(1, steps // 20), clip=1.0, seed=seed, on_step=progress,
    )  # fmt: skip
    return {"train_loss": train_loss, **{f"val_loss_{name}": masked_loss(model, name) for name in ("en", "de", *RARE)}}


_CODE = (models, loop, guides, sys.modules[__name__])
RECIPES: dict[str, Recipe] = {
    "guide_encoder": Recipe(
        "multilingual encoder on the guides", guide_encoder, fit_guide_encoder, guides.told, 2000, _CODE
    ),
}
