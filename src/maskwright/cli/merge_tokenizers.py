"""Whether two model folders mean the same by a token, told from their files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from maskwright.core.errors import BadInput

# Each of these tells the whole vocabulary, merges.txt only how its words are put together.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_MERGES = "merges.txt"
_REMEDY = "--any-tokenizer goes on all the same and keeps the base's"


def same_tokenizer(base: Path, other: Path) -> None:
    """Raise BadInput when tokens differ, or when both folders have a tokenizer and no file of one is in the other."""
    mine, theirs = ([file for file in _VOCABULARIES if (folder / file).is_file()] for folder in (base, other))
    shared = [file for file in mine if file in theirs]
    for file in (*shared, _MERGES):
        one, two = base / file, other / file
        if one.is_file() and two.is_file() and _words(one) != _words(two):
            raise BadInput(f"{other}: its {file} differs from the base's, so a token means another thing; {_REMEDY}")
    if mine and theirs and not shared:
        raise BadInput(
            f"{other} has {' and '.join(theirs)}, the base {base} has {' and '.join(mine)}: "
            f"whether their tokens agree cannot be told; {_REMEDY}"
        )


def _words(path: Path) -> str:
    """What decides which token is which: of a tokenizer.json its vocabulary, merges and added tokens, else the bytes."""
    content = path.read_bytes()
    if path.name == "tokenizer.json":
        try:
            told = json.loads(content)
            model = told["model"]
            added = [[each["id"], each["content"]] for each in told.get("added_tokens") or []]
            merges = [
                pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []
            ]  # old and new
            content = json.dumps([model.get("vocab"), merges, added], sort_keys=True).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # not of the known form: then its bytes must agree
    return hashlib.sha256(content).hexdigest()
