"""One `attend` run: everything is checked and made before the first forward pass, then measured in turns, then told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskwright.attention import choose
from maskwright.cli.attend_methods import build, card_of, fitting, told_settings
from maskwright.cli.attend_outcome import Pieces, figures, told_counts, verdict
from maskwright.cli.attended import Counts, Way, counted, needles, prose
from maskwright.cli.plan import _gflops
from maskwright.core.cache import building
from maskwright.core.errors import BadInput
from maskwright.lab.haystack import Haystack, haystack
from maskwright.lab.record import machine, peak_bytes, versions
from maskwright.lab.text import text_hash, topics_split
from maskwright.models.evaluate import read_text
from maskwright.models.evaluate import windows as cut
from maskwright.models.load import Source, find, load, read_in
from maskwright.report.attention import FORMAT, pictures, write

Say = Callable[[str], None]
_SLACK = 4  # tokens by which one question may be longer than those looked at


@dataclass(frozen=True)
class Request:
    """What the run depends on, as it was asked for."""

    model: str
    methods: tuple[str, ...]
    set_: tuple[str, ...] = ()
    text: Path | None = None
    length: int = 2048
    questions: int = 32
    contexts: int = 4
    windows: int | None = None
    decoded: int = 33
    stepwise: bool = False
    impl: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    command: str | None = None


class Job:
    """`open` checks and makes; `plan` says what will be done; `run` measures, writes and gives the report."""

    def __init__(self, request: Request, out: Path, replace: bool = False, dry_run: bool = False) -> None:
        self.request, self.out = request, out
        self.made = [(card_of(slug), made) for slug, made in build(request.methods, request.set_)]
        if not dry_run:
            refuse_out(out, replace)
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def open(self) -> None:
        """Load the model, check that it and the methods fit, cut the text. Raises BadInput before any long work."""
        asked = self.request
        self.text = read_text(asked.text) if asked.text else topics_split()[1]
        self.text_name = str(asked.text) if asked.text else "Python help topics, held-out part"
        start = time.perf_counter()
        self.source: Source = find(asked.model)
        self.model, self.tokenizer = load(self.source, getattr(torch, asked.dtype))
        self.shape = fitting(self.model, self.source.name, [method for _, method in self.made])
        if self.tokenizer is None:
            raise BadInput(f"{self.source.name} has no tokenizer, so the text cannot be read")
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions and asked.length > positions:
            raise BadInput(f"length {asked.length} is beyond the {positions} positions of {self.source.name}")
        self.choice = choose(torch.zeros(1, 1, 1, self.shape.width, dtype=getattr(torch, asked.dtype)), asked.impl)
        self._requests()
        read_in(self.model)
        self.seconds["load"] = time.perf_counter() - start
        self.ways = [Way("dense"), *(Way(c.slug, method, asked.impl, asked.seed) for c, method in self.made)]

    def _requests(self) -> None:
        asked = self.request
        room, hays = asked.decoded, []
        if asked.contexts:
            room = max(room, _longest([self._hay(asked.length - room, 0)]) + _SLACK)
            hays = [self._hay(asked.length - room, i) for i in range(asked.contexts)]
            if _longest(hays) > room:
                raise BadInput(f"a question is {_longest(hays)} tokens long; ask for --decoded {_longest(hays)} or more")
        self.hays, self.prefilled = hays, asked.length - room
        if self.prefilled < 8:
            raise BadInput(f"length {asked.length} less {room} tokens to decode leaves nothing to prefill")
        count = asked.windows
        if count is None:
            tokens = len(self.tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"])
            count = min(max(asked.contexts, 1), tokens // asked.length)
            if not count and not hays:
                raise BadInput(f"{self.text_name}: {tokens} tokens, but a window takes {asked.length}")
        tail = self.prefilled + asked.decoded
        self.windows: list[Tensor] = [
            ids[:, :tail] for ids in cut(self.tokenizer, self.text, count, asked.length, what=self.text_name)
        ] if count else []  # fmt: skip

    def _hay(self, length: int, index: int) -> Haystack:
        asked = self.request
        if length < 1:
            raise BadInput(f"length {asked.length} leaves no room for a context and a question")
        seed = asked.seed * 1000 + index
        return haystack(self.tokenizer, length, needles=asked.questions, seed=seed, text=self.text)

    @property
    def plan(self) -> dict[str, Any]:
        """What will be done, and about how long it takes."""
        asked, shape = self.request, self.shape
        prefills = (len(self.hays) + len(self.windows)) * len(self.ways) + len(self.made)
        weights = sum(p.numel() for p in self.model.parameters())
        pairs = self.prefilled**2 / 2 * shape.layers * shape.heads * shape.width * 2
        each = (2 * weights * self.prefilled + 2 * pairs) / _gflops()
        asks = len(self.hays) * len(self.ways) * asked.questions * each * (300 if asked.stepwise else 72) / self.prefilled
        return {
            "model": self.source.name, "layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads,
            "width": shape.width, "dtype": asked.dtype, "dense": self.model.config._attn_implementation,
            "methods": [
                {"slug": c.slug, "settings": told_settings(method), "impl": self.choice.name, "why": self.choice.reason}
                for c, method in self.made
            ],
            "contexts": len(self.hays), "questions": asked.questions, "windows": len(self.windows), "length": asked.length,
            "prefilled": self.prefilled, "decoded": asked.decoded, "prefills": prefills,
            "seconds": prefills * each + asks + 5,
        }  # fmt: skip

    def run(self, progress: Say) -> dict[str, Any]:
        """Measure, write OUT, give the report. Nothing is on the disk before the last step."""
        start = time.perf_counter()
        for way in self.ways:  # builds kernels, reads the weights in, wakes the threads
            with torch.no_grad():
                self._warm(way)
        self.seconds["warm up"] = time.perf_counter() - start
        found: dict[str, Pieces] = {way.name: {"needles": [], "prose": []} for way in self.ways}
        work: list[tuple[str, list[Callable[[Way], dict[str, Any]]]]] = [
            ("needles", [partial(needles, self.model, hay=hay, stepwise=self.request.stepwise) for hay in self.hays]),
            ("prose", [partial(prose, self.model, ids=ids, tail=self.request.decoded) for ids in self.windows]),
        ]
        for kind, requests in work:
            start = time.perf_counter()
            for turn, measure in enumerate(requests):
                shift = turn % len(self.ways)  # in turns, and no way always first
                for way in [*self.ways[shift:], *self.ways[:shift]]:
                    piece = measure(way)
                    found[way.name][kind].append(piece)
                    progress(f"{kind} {turn + 1}/{len(requests)} {way.name}: first token after {piece['prefill']:.2f} s")
            self.seconds[kind] = time.perf_counter() - start
        start = time.perf_counter()
        counts: dict[str, Counts | str] = {}
        for way in self.ways[1:]:
            progress(f"counting what {way.name} reads")
            try:
                counts[way.name] = counted(self.model, way, self._sample(), self.request.decoded)
            except BadInput as error:
                counts[way.name] = f"Pairs were not counted: {error}."
        self.seconds["count pairs"] = time.perf_counter() - start
        self.seconds["total"] = time.perf_counter() - self.began
        report = self._report(found, counts)
        publish(report, self.out)
        return report

    def _sample(self) -> Tensor:
        if self.windows:
            return self.windows[0]
        hay = self.hays[0]
        tail = hay.context[:, : self.request.decoded]
        return torch.cat([hay.context, tail], 1)

    def _warm(self, way: Way) -> None:
        with way.on(self.model):
            ids = self._sample()[:, :256]
            out = self.model(input_ids=ids[:, :-2], use_cache=True, logits_to_keep=1)
            for at in (-2, -1):
                self.model(input_ids=ids[:, at:][:, :1], past_key_values=out.past_key_values, use_cache=True)

    def _report(self, found: dict[str, Pieces], counts: dict[str, Counts | str]) -> dict[str, Any]:
        asked, shape, dense = self.request, self.shape, figures(found["dense"], found["dense"])
        notes = [self.source.note] if self.source.note else []
        if len(self.hays) + len(self.windows) < 3:
            notes.append("Fewer than three requests were timed: read the times as a first look.")
        if "retrieval" in dense and dense["retrieval"]["value"] < 0.7:
            notes.append(f"Dense itself answers {dense['retrieval']['value']:.0%} of the questions at this length.")
        told = []
        for room, method in self.made:
            mine, seen = figures(found[room.slug], found["dense"]), counts[room.slug]
            masked = isinstance(seen, str) or seen.kept < seen.causal
            told.append({
                "slug": room.slug, "name": room.entry, "title": room.title, "arxiv": room.arxiv,
                "settings": told_settings(method), "impl": self.choice.name, "why": self.choice.reason, **mine,
                "pairs": told_counts(seen), "verdict": verdict(mine, dense, masked),
                "what": "" if isinstance(seen, str) else seen.what, "pictures": [] if isinstance(seen, str) else
                pictures(seen),
            })  # fmt: skip
        return {
            "format": FORMAT, "version": 1,
            "model": {
                "name": self.source.name, "source": self.source.origin, "class": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()), "note": self.source.note,
                "layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads, "width": shape.width,
                "dtype": asked.dtype, "attention": self.model.config._attn_implementation,
            },
            "length": asked.length, "prefilled": self.prefilled, "contexts": len(self.hays), "questions": asked.questions,
            "windows": len(self.windows), "decoded": asked.decoded, "stepwise": asked.stepwise,
            "text": {"source": self.text_name, "sha256": text_hash(self.text)},
            "dense": dense, "methods": told, "seconds": self.seconds, "memory": {"peak_bytes": peak_bytes()},
            "command": asked.command, "machine": machine(), "versions": versions(), "seed": asked.seed,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"), "notes": notes,
        }  # fmt: skip


def _longest(hays: Sequence[Haystack]) -> int:
    return max(len(q) + len(a) for hay in hays for q, a in zip(hay.questions, hay.answers, strict=True))


def refuse_out(out: Path, replace: bool) -> None:
    """Raises BadInput when OUT may not be written: it exists, or holds anything but an earlier report of `attend`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise BadInput(f"{out}: is a file; choose another --out")
    names = {path.name for path in out.iterdir()}
    try:
        mine = json.loads((out / "report.json").read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        mine = not names
    if not mine:
        raise BadInput(f"{out} holds something else; choose another --out")
    if names and not replace:
        raise BadInput(f"{out} exists; --replace overwrites its report")


def publish(report: dict[str, Any], out: Path) -> None:
    """Both files appear together in a new folder; in an old one each replaces its own."""
    if out.exists():
        write(report, out)
        return
    with building(out) as folder:
        write(report, folder)
