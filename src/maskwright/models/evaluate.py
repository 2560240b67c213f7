"""Perplexity with its standard error, sample text and decoding speed of a causal language model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.select import generator

_HEAD_ROWS = 128  # logits made at a time: 128 x 49,152 floats are 25 MB


@dataclass(frozen=True)
class Loss:
    """Mean next-token loss per window. `stderr` is over windows: tokens of one window are not independent."""

    windows: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.windows) / len(self.windows)

    @property
    def stderr(self) -> float:
        n = len(self.windows)
        return math.sqrt(sum((w - self.mean) ** 2 for w in self.windows) / (n - 1) / n) if n > 1 else math.nan

    def figures(self) -> dict[str, float]:
        """Perplexity and loss with standard errors (the perplexity's by the delta method)."""
        value = math.exp(min(self.mean, 700.0))
        return {"value": value, "stderr": value * self.stderr, "loss": self.mean, "loss_stderr": self.stderr}

    def paired(self, after: Loss) -> dict[str, float]:
        """Mean rise of the loss window by window, with its standard error."""
        rise = Loss(tuple(b - a for a, b in zip(self.windows, after.windows, strict=True)))
        return {"loss_difference": rise.mean, "stderr": rise.stderr}


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises BadInput for a missing one, another encoding, or an empty file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise BadInput(f"{path}: holds no text")
    return text


def windows(
    tokenizer: Any, text: str, count: int, length: int, *, seed: int | None = None, what: str = "text"
) -> list[Tensor]:
    """`count` windows of `length` tokens, (1, length) each: the first ones, or a seeded choice.

    Raises BadInput when the text is too short, saying how much is there and how much is needed.
    """
    # The warning that a long text exceeds the model's length does not apply: it is cut into windows here.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    there = len(ids) // length
    if there < count:
        raise BadInput(f"{what}: {len(ids)} tokens, but {count} windows of {length} need {count * length}")
    chosen = range(count)
    if seed is not None:
        chosen = sorted(torch.randperm(there, generator=generator(seed, "calibration"))[:count].tolist())  # type: ignore[assignment]
    return [ids[i * length : (i + 1) * length][None] for i in chosen]


@torch.no_grad()
def loss(model: Any, batches: Sequence[Tensor], progress: Callable[[int], None] | None = None) -> Loss:
    """Mean next-token loss of every window. The head is applied to a few rows at a time where that is exact.

    Raises BadInput when a loss is not finite.
    """
    body: Any = getattr(model, "base_model", None)
    head: Any = model.get_output_embeddings()
    chunked = head is not None and body is not model and _head_is_all(model, body, head, batches[0][:, :8])
    out = []
    for i, ids in enumerate(batches):
        hidden = body(input_ids=ids, use_cache=False)[0] if chunked else model(input_ids=ids, use_cache=False).logits
        total = 0.0
        for start in range(0, ids.shape[1] - 1, _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, ids.shape[1] - 1)
            part = head(hidden[0, start:stop]) if chunked else hidden[0, start:stop]
            total += float(F.cross_entropy(part.float(), ids[0, start + 1 : stop + 1], reduction="sum"))
        out.append(total / (ids.shape[1] - 1))
        if not math.isfinite(out[-1]):
            raise BadInput(f"the model's loss on window {i} is not finite")
        if progress:
            progress(i + 1)
    return Loss(tuple(out))


def _head_is_all(model: Any, body: Any, head: Any, ids: Tensor) -> bool:
    # Some models scale or cap their logits after the head; those take the plain forward.
    whole = model(input_ids=ids, use_cache=False).logits
    return torch.allclose(whole, head(body(input_ids=ids, use_cache=False)[0]), rtol=1e-4, atol=1e-4)


def asked(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model expects it: in the tokenizer's chat template where it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return prompt
    chat = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int = 40) -> tuple[list[str], float]:
    """Greedy continuations, and the median tokens per second of decoding (prompts excluded)."""
    texts, steps = [], []
    for prompt in prompts:
        ids = torch.tensor(tokenizer(asked(tokenizer, prompt))["input_ids"])[None]
        prefix = ids.shape[1]
        out = model(input_ids=ids, use_cache=True)
        for _ in range(tokens):
            best = int(out.logits[0, -1].argmax())
            ids = torch.cat([ids, torch.tensor([[best]])], dim=1)
            if best in _ends(model, tokenizer):
                break
            start = time.perf_counter()
            out = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - start)
        texts.append(tokenizer.decode(ids[0, prefix:], skip_special_tokens=True))
    return texts, 1 / sorted(steps)[len(steps) // 2] if steps else math.nan


@torch.no_grad()
def decode_times(model: Any, ids: Tensor, tokens: int) -> list[float]:
    """Seconds of each of `tokens` greedy steps after the prompt `ids` (1, length), on a key-value cache."""
    out = model(input_ids=ids, use_cache=True)
    times = []
    for _ in range(tokens):
        best = out.logits[:, -1].argmax(-1, keepdim=True)
        start = time.perf_counter()
        out = model(input_ids=best, past_key_values=out.past_key_values, use_cache=True)
        times.append(time.perf_counter() - start)
    return times


def _ends(model: Any, tokenizer: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = ends if isinstance(ends, list) else [ends]
    return {e for e in [*known, tokenizer.eos_token_id] if e is not None}
