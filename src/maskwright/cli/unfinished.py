"""What an interrupted prune run leaves on disk, and how it goes on.

`OUT.partial/` holds run.json (what the run depends on), before.json and after.json (quality), counts.safetensors (a
budget's counts where it looked at the dense model) and blocks/ (each block's masks and new weights). Every file
appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.pattern import parse
from maskwright.core.store import pack, replacing, unpack
from maskwright.report.page import put
from maskwright.weights.solve import BlockResult, SiteResult


class Unfinished:
    """The folder of one run in progress."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, mine: Mapping[str, Any], resume: bool, any_machine: bool) -> Mapping[str, BlockResult]:
        """The blocks that are done, by label: none for a new run, whose folder is made empty.

        `mine` is what the run depends on. Raises BadInput naming what differs when an interrupted run had another;
        `any_machine` lets threads and instruction set differ.
        """
        mark = self.folder / "run.json"
        if resume and mark.is_file():
            theirs = json.loads(mark.read_text(encoding="utf-8"))
            for key, value in mine.items():
                if theirs.get(key) != json.loads(json.dumps(value)) and not (key == "machine" and any_machine):
                    more = "; --any-machine goes on all the same" if key == "machine" else ""
                    raise BadInput(
                        f"{self.folder}: the unfinished run has another {key} ({theirs.get(key)}, now {value}){more}"
                    )
            return _Done(self.folder / "blocks")
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "blocks").mkdir(parents=True)
        put(mark, json.dumps(mine, indent=1))
        return {}

    def keep_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Store a budget's counts: a resumed run no longer has the dense model they were found on."""
        with replacing(self.folder / "counts.safetensors") as partial:
            save_file({name: count.contiguous() for name, count in counts.items()}, partial)

    def counts(self) -> dict[str, Tensor] | None:
        """The counts that were stored, or None."""
        kept = self.folder / "counts.safetensors"
        return load_file(kept) if kept.is_file() else None

    def keep_quality(self, when: str, told: Mapping[str, Any]) -> None:
        """Store the quality measured `before` or `after`."""
        put(self.folder / f"{when}.json", json.dumps(told))

    def quality(self, when: str) -> dict[str, Any] | None:
        """The quality that was stored, or None."""
        mark = self.folder / f"{when}.json"
        return json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else None

    def keep(self, index: int, block: BlockResult) -> None:
        """Store one solved block."""
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {"label": block.label, "sites": []}
        for r in block.sites:
            tensors[f"{r.name}:bits"] = torch.from_numpy(pack(r.mask.keep))
            if r.value is not None:
                tensors[f"{r.name}:value"] = r.value.contiguous()
            facts["sites"].append(
                {"name": r.name, "block": r.block, "shape": list(r.mask.shape), "pattern": r.mask.pattern.spec(),
                 "error": r.error, "note": r.note, "base": r.base}
            )  # fmt: skip
        with replacing(self.folder / "blocks" / f"{index:05d}.safetensors") as partial:
            save_file(tensors, partial, metadata={"block": json.dumps(facts)})


class _Done(Mapping[str, BlockResult]):
    """The blocks an interrupted run left on disk, by label and in order; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._paths = {str(_facts(path)["label"]): path for path in sorted(folder.glob("*.safetensors"))}

    def __getitem__(self, label: str) -> BlockResult:
        return _read_block(self._paths[label])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def _facts(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        return json.loads(handle.metadata()["block"])


def _read_block(path: Path) -> BlockResult:
    facts, tensors = _facts(path), load_file(path)
    found = []
    for s in facts["sites"]:
        shape = tuple(s["shape"])
        mask = Mask(unpack(tensors[f"{s['name']}:bits"].numpy(), shape), parse(s["pattern"])).check()
        value = tensors.get(f"{s['name']}:value")
        found.append(SiteResult(s["name"], s["block"], mask, value, s["error"], s["note"], s["base"]))
    return BlockResult(facts["label"], tuple(found))
