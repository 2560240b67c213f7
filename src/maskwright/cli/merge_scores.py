"""Perplexity of a merge's inputs and of the merge: all it needs is checked before the merge, then measured after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.lab.text import text_hash, topics_split
from maskwright.models.evaluate import loss, read_text, windows
from maskwright.models.folder import CONFIG
from maskwright.models.load import Source, class_of, load, quiet, read_tokenizer
from maskwright.models.raw import one_line


@dataclass(frozen=True)
class Scoring:
    """One text, cut into windows by the tokenizer of each input: first the base, whose tokenizer the merge has too."""

    text: str
    sha256: str
    batches: Sequence[Sequence[Tensor]]

    @classmethod
    def of(cls, text: str, paths: Sequence[Path], count: int, length: int) -> Scoring:
        """`text`: a UTF-8 file, or `topics`. Raises BadInput for one too short, and inputs that are no language models."""
        words = topics_split()[1] if text == "topics" else read_text(Path(text))
        for path in paths:
            if not (path / CONFIG).is_file():
                raise BadInput(f"{path}: only a model folder with a config can be scored")
        cut = [windows(_tokenizer(path, length), words, count, length, what=text) for path in paths]
        return cls(text, text_hash(words), cut)

    def scores(self, names: Sequence[str], folders: Sequence[Path], say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Perplexity of each input and, last, of the merge, one model in memory at a time."""
        out = []
        for name, folder, batches in zip(names, folders, [*self.batches, self.batches[0]], strict=True):
            say(f"perplexity of {name}")
            try:
                figures = loss(load(Source(folder, name, str(folder)))[0], batches).figures()
            except BadInput as error:  # what no look at the files foretells, such as a loss that is not finite
                raise BadInput(f"{name}: {error}; --resume without --evaluate keeps the merge") from None
            out.append({"model": name, **figures, "text": self.text, "sha256": self.sha256})
        return out


def _tokenizer(path: Path, length: int) -> Any:
    """The tokenizer of a folder with a language model; of the model only the classes are made, no weight is read."""
    with one_line(path), quiet() as transformers:
        config, kind = class_of(path)
        if kind is not transformers.AutoModel:
            with torch.device("meta"):
                head = kind(config).get_output_embeddings()
        else:
            head = None
        tokenizer = read_tokenizer(path)
    if tokenizer is None or head is None:
        raise BadInput(f"{path}: --evaluate measures perplexity, which needs a language model and its tokenizer")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and length > positions:
        raise BadInput(f"{path}: windows of {length} tokens are beyond the model's {positions} positions")
    return tokenizer
