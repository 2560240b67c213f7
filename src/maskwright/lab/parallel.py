"""The seeds of a check side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from maskwright.core.errors import BadInput
from maskwright.core.method import Card
from maskwright.lab import record
from maskwright.lab.pieces import Piece, Progress, Scale, load_claim, one_seed

_lines: list[SimpleQueue[str]] = []  # in a process of its own: where its lines go


def seeds_apart(
    card: Card, seeds: Sequence[int], scale: Scale, store: Path | None, jobs: int, say: Progress
) -> dict[int, dict[str, Piece]]:
    """`one_seed` for every seed, `jobs` of them at a time; each process takes its share of this one's threads.

    An arm that fails ends the check, as in one process: what had ended is in `store`. No process outlives the call.
    Raises BadInput where the system ended a process, which is how it answers more memory than there is.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy a torch that already has threads
    lines: SimpleQueue[str] = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, context, _begin, (lines, record.threads(jobs))) as pool:
        found = {seed: pool.submit(_seed, card, seed, scale, store) for seed in seeds}
        try:
            left = set(found.values())
            while left:
                done, left = wait(left, timeout=0.2)
                while not lines.empty():
                    say(lines.get())
                for future in done:
                    future.result()
        except BrokenProcessPool:  # the pool has ended the others by itself
            raise BadInput(
                f"{card.slug}: the system ended one of {jobs} processes, often for want of memory: try fewer --jobs"
            ) from None
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # breaks the pool, whose end waits for them and drops the seeds that wait
            raise
        return {seed: future.result() for seed, future in found.items()}


def _begin(lines: SimpleQueue[str], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _lines.append(lines)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a check that was killed leaves no arm running
        os._exit(1)


def _seed(card: Card, seed: int, scale: Scale, store: Path | None) -> dict[str, Piece]:
    return one_seed(card, load_claim(card), seed, scale, store, _lines[0].put)
