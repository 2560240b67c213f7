"""Spoken English telephone prompts as log-mels, and Whisper tiny.en listening to five seconds of them.

The prompts are Asterisk's (one speaker, 8 kHz). Whisper wants 16 kHz and 80 bins: the sound is doubled, and only the bins
wholly below 4 kHz are shown as features; the recogniser puts each clip's own empty rows back above them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.inputs.speech import bins_below, doubled, read_wave
from maskwright.lab import torchvision_shim
from maskwright.lab.pretrained import whisper_tiny
from maskwright.lab.sources import fetch_debian

PROMPTS, RATE, SECONDS, LIMIT = "asterisk-core-sounds-en-wav", 8000, 5, 28
START, END = (50257, 50362), 50256  # <|startoftranscript|> <|notimestamps|>, <|endoftext|>
Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Prompts:
    """names of the clips; features (n, bins, frames): what a mask may touch; above (n, rest, frames): empty rows."""

    names: tuple[str, ...]
    features: Tensor
    above: Tensor


@cache
def prompts(least: float = 1.5) -> Prompts:
    """Every prompt of `least` to 5 seconds, by name, as Whisper's log-mels of 5 s: (log10 of the power + 4) / 4."""
    torchvision_shim.install()
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(chunk_length=SECONDS)
    folder = fetch_debian(PROMPTS) / "usr" / "share" / "asterisk" / "sounds" / "en_US_f_Allison"
    names, found = [], []
    for path in sorted(folder.glob("*.wav")):
        samples = read_wave(path, RATE)
        if least * RATE <= len(samples) <= SECONDS * RATE:
            names.append(path.stem)
            made = extract(doubled(samples).numpy(), sampling_rate=2 * RATE, return_tensors="np")["input_features"]
            found.append(torch.from_numpy(made[0]).float())
    mels = torch.stack(found)
    bins = bins_below(torch.from_numpy(extract.mel_filters), 2 * RATE, RATE / 2)
    return Prompts(tuple(names), mels[:, :bins].contiguous(), mels[:, bins:].contiguous())


class Ear:
    """Whisper tiny.en on the first 5 s: positions and config cut, weights frozen."""

    def __init__(self, above: Tensor) -> None:
        self.above = above
        self.model, self.tokenizer = whisper_tiny()
        encoder, length = self.model.model.encoder, above.shape[2] // 2
        positions = nn.Embedding(length, encoder.embed_positions.embedding_dim)
        positions.weight.data.copy_(encoder.embed_positions.weight[:length])
        encoder.embed_positions = positions
        self.model.config.max_source_positions = encoder.max_source_positions = length
        self.model.requires_grad_(False)
        told = self.model.generation_config
        self.never, self.not_first = list(told.suppress_tokens), list(told.begin_suppress_tokens)

    @torch.no_grad()
    def hear(self, features: Tensor, numbers: Sequence[int], batch: int = 20) -> list[Tokens]:
        """Greedy transcripts without the end token; one of 28 tokens has come to no end. features: (n, bins, frames)."""
        found: list[Tokens] = []
        for at in range(0, len(features), batch):
            x = self._full(features[at : at + batch], numbers[at : at + batch])
            found += [tuple(row[: row.index(END)] if END in row else row) for row in self._greedy(x).tolist()]
        return found

    def _greedy(self, x: Tensor) -> Tensor:
        """Token numbers (n, at most 28) with the end token, or what follows one."""
        state, past = (self.model.model.encoder(x)[0],), None
        given, said = torch.tensor([START]).expand(len(x), -1), torch.zeros(len(x), 0, dtype=torch.long)
        while said.shape[1] < LIMIT and not bool((said == END).any(1).all()):
            out = self.model(encoder_outputs=state, decoder_input_ids=given, past_key_values=past, use_cache=True)
            scores, past = out.logits[:, -1], out.past_key_values
            scores[:, self.never if said.shape[1] else self.never + self.not_first] = -torch.inf
            given = scores.argmax(1, keepdim=True)
            said = torch.cat([said, given], 1)
        return said

    def loss(self, features: Tensor, number: int, tokens: Tokens) -> Tensor:
        """Cross entropy of a transcript and its end, a mean over tokens. features: (1, bins, frames)."""
        told = torch.tensor([*START, *tokens, END])
        out = self.model(input_features=self._full(features, [number]), decoder_input_ids=told[None, :-1]).logits[0]
        return F.cross_entropy(out[len(START) - 1 :], told[len(START) :])

    def words(self, tokens: Tokens) -> list[str]:
        """Lower case, without marks."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True).lower()
        return "".join(c if c.isalnum() or c == "'" else " " for c in text).split()

    def _full(self, features: Tensor, numbers: Sequence[int]) -> Tensor:
        return torch.cat([features, self.above[list(numbers)]], 1)


def word_errors(told: Sequence[str], heard: Sequence[str]) -> int:
    """Least number of words put in, left out or changed to come from one list to the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(told, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]
