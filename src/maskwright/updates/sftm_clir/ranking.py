"""The second stage of retrieval: reorder the first stage's best by a pair score; mean average precision; adapter sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from maskwright.core.errors import BadInput

PairScore = Callable[[str, Sequence[str]], Tensor]


def rerank(
    score: PairScore, queries: Mapping[str, str], candidates: Mapping[str, Sequence[str]], documents: Mapping[str, str],
    depth: int = 100,
) -> dict[str, tuple[str, ...]]:  # fmt: skip
    """Each query's first `depth` candidates by falling score; equal scores and what lies below keep their order.

    score(query text, document texts) -> (documents,); queries: id -> text; candidates: query id -> document ids, best
    first; documents: id -> text. Raises BadInput naming the query for an empty or unknown list, repeated documents,
    NaN scores or scores of another length.
    """
    if depth < 1:
        raise BadInput(f"rerank needs depth >= 1, got {depth}")
    found = {}
    for name, text in queries.items():
        listed = tuple(candidates.get(name, ()))
        if not listed:
            raise BadInput(f"query {name!r} has no candidates to rerank")
        unknown = [key for key in listed if key not in documents]
        if unknown or len(set(listed)) < len(listed):
            what = f"an unknown document {unknown[0]!r}" if unknown else "a document twice"
            raise BadInput(f"query {name!r} lists {what}")
        best = listed[:depth]
        scores = score(text, [documents[key] for key in best]).detach()
        if tuple(scores.shape) != (len(best),) or bool(scores.isnan().any()):
            raise BadInput(f"query {name!r}: {len(best)} documents need that many scores, no NaN; got {tuple(scores.shape)}")
        order = torch.sort(scores, descending=True, stable=True).indices.tolist()
        found[name] = (*(best[i] for i in order), *listed[depth:])
    return found


def mean_average_precision(run: Mapping[str, Sequence[Hashable]], qrels: Mapping[str, Collection[Hashable]]) -> float:
    """Mean over queries of AP = sum over relevant documents found of (how many so far / rank) / number relevant.

    run: query id -> documents, best first; qrels: query id -> its relevant documents. Relevant documents that were not
    found count in the denominator, a query without relevant documents is skipped, one that was not run has AP 0.
    Raises BadInput where no query has relevant documents, or a document stands twice in a ranking.
    """
    found = []
    for name, relevant in qrels.items():
        if not relevant:
            continue
        ranking = list(run.get(name, ()))
        if len(set(ranking)) < len(ranking):
            raise BadInput(f"query {name!r} ranks a document twice")
        ranks = [rank for rank, key in enumerate(ranking, 1) if key in relevant]
        found.append(sum(seen / rank for seen, rank in enumerate(ranks, 1)) / len(set(relevant)))
    if not found:
        raise BadInput("no query has relevant documents: there is no mean average precision")
    return sum(found) / len(found)


def adapter_entries(reduction: int, *, layers: int = 12, width: int = 768) -> int:
    """Entries of Pfeiffer adapters of bottleneck width / reduction in every layer: k of an SFTM as large as they.

    layers * (2 width b + b + width): down and up projection with their biases (MAD-X, arXiv 2005.00052).
    Raises BadInput for a reduction that does not divide the width.
    """
    if reduction < 1 or width % reduction or layers < 1:
        raise BadInput(f"adapters of width {width} in {layers} layers cannot be reduced by {reduction}")
    bottleneck = width // reduction
    return layers * (2 * width * bottleneck + bottleneck + width)
