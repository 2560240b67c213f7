"""SmolLM2-135M end to end under attention methods, against dense SDPA. Run it with nothing else running; it takes hours.

Three parts, every figure of them a piece kept in the cache, so that an interrupted run goes on where it was:
  prefill    8,192 tokens, logits of the last position, all ways in turns; some tokens decoded after each; dense in two
             dtypes, of which the faster one is what ratios are taken against
  length     the longest of 8,192, 4,096, 2,048 tokens at which dense answers 70% (a first look at 3 contexts, then all)
  retrieval  at that length: one prefill a context and way, 32 questions on copies of its cache, 12 contexts, paired;
             nothing is timed here, so that other work may run beside it

A method's budget is a quarter of the length, by rule, not by what came out. Writes results/attention_model.json and
prints the tables. Smaller trials (--length 1024 --contexts 1 --turns 1) print and write nothing; --methods a,b
leaves ways out.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch

from maskwright.attention import choose
from maskwright.cli.attend_outcome import mean_of, paced
from maskwright.cli.attended import Way, counted, followed, needles, prefill, stored_bytes
from maskwright.core.cache import cache_dir, write_atomic
from maskwright.core.method import card, get
from maskwright.lab.haystack import haystack
from maskwright.lab.record import machine, piece_hash, results_dir, to_json, versions
from maskwright.lab.text import text_hash, topics_split
from maskwright.models.evaluate import windows
from maskwright.models.load import files_hash, find, load, read_in
from maskwright.weights.speed import median

LENGTHS, ENOUGH, NEAR = (8192, 4096, 2048), 0.7, 0.05
ROOM = 64  # tokens of a request left for questions and what is decoded
PREFILL = ("vertical_slash", "block_sparse", "flexprefill", "hip", "sliding_window", "s2_attention")
DECODE = ("quest", "snapkv", "ada_snapkv")
# Quest masks single tokens alone: its questions are read token by token, as in decoding.
STEPWISE = ("quest",)


def settings(slug: str, length: int) -> dict:
    """A method's settings at a budget of a quarter of the length."""
    budget = length // 4
    return {
        "vertical_slash": {"vertical_size": budget // 2, "slash_size": budget // 2},
        "block_sparse": {"top_chunks": budget // 64},
        "flexprefill": {"min_budget": budget // 2},
        "hip": {"mask_k": budget},
        "sliding_window": {"window": budget},
        "s2_attention": {},
        "quest": {"token_budget": budget},
        "snapkv": {"capacity": budget},
        "ada_snapkv": {"capacity": budget},
    }[slug]


class Pieces:
    """Measured pieces in the cache. The name of one holds everything its figures depend on."""

    def __init__(self, model: str) -> None:
        self.folder = cache_dir() / "attention_model"
        told = [model, versions(), machine(), text_hash(topics_split()[1]), _code()]
        self.stamp = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def get(self, name: str, way: Way, do) -> dict:
        """The piece `name` of one way, measured now unless it is there."""
        code = piece_hash(card(way.name)) if way.method is not None else ""
        told = json.dumps([self.stamp, code, name, way.name, repr(way.method)])
        path = self.folder / f"{name}-{way.name.replace(' ', '-')}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        found = do()
        write_atomic(path, to_json(found).encode())
        print(f"  {name} {way.name}: {found.get('prefill', 0):.2f} s", flush=True)
        return found


def _code() -> str:
    root = Path(__file__).resolve().parents[1] / "src" / "maskwright"
    paths = [*sorted((root / "kernels" / "block_attention").rglob("*"))]
    paths += [root / "cli" / "attended.py", root / "lab" / "haystack.py"]
    parts = [path.read_bytes() for path in paths if path.suffix in (".py", ".cpp", ".h", ".inl")]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def timed(model, way: Way, ids: torch.Tensor, tail: int) -> dict:
    """One request: seconds to the first token, of each decoded one, bytes held."""
    with way.on(model):
        cache, logits, seconds = prefill(model, ids[:, :-tail])
        held = stored_bytes(cache)
        _, steps = followed(model, cache, logits, ids[0, -tail:])
    return {"prefill": seconds, "steps": steps, "stored": held}


def warm(model, way: Way, ids: torch.Tensor) -> None:
    with way.on(model):
        cache, logits, _ = prefill(model, ids[:, :256])
        followed(model, cache, logits, ids[0, :3])


def prefills(pieces: Pieces, model, tokenizer, source, ways: list[Way], length: int, turns: int, tail: int) -> dict:
    """Part 1. The dense model in bfloat16 has turns of its own; float32 is what the methods run in."""
    texts = windows(tokenizer, topics_split()[1], min(turns, 3), length)
    found: dict[str, list[dict]] = {way.name: [] for way in ways}
    for way in ways:
        warm(model, way, texts[0])
    for turn in range(turns):
        shift = turn % len(ways)
        for way in [*ways[shift:], *ways[:shift]]:
            ids = texts[turn % len(texts)]
            name = f"prefill-{length}-{turn}"
            found[way.name].append(pieces.get(name, way, lambda w=way, i=ids: timed(model, w, i, tail)))
    other, _ = load(source, torch.bfloat16)
    half = Way("dense bfloat16")
    warm(other, half, texts[0])
    found[half.name] = []
    for turn in range(min(turns, 2)):
        ids = texts[turn % len(texts)]
        found[half.name].append(pieces.get(f"prefill-{length}-{turn}", half, lambda i=ids: timed(other, half, i, tail)))
        if found[half.name][0]["prefill"] > 2 * found["dense"][0]["prefill"]:
            break  # nobody would run it: one turn tells as much
    fastest = min(("dense", half.name), key=lambda name: median([p["prefill"] for p in found[name]]))
    base = found["dense"]
    table = {}
    for name, mine in found.items():
        theirs = base[: len(mine)]
        table[name] = {
            "first_token": paced([p["prefill"] for p in mine], [p["prefill"] for p in theirs]),
            "decode": paced([median(p["steps"]) for p in mine], [median(p["steps"]) for p in theirs]),
            "stored": mine[0]["stored"],
        }
    best = table[fastest]["first_token"]["seconds"]["median"]
    for told in table.values():
        told["over_fastest_dense"] = best / told["first_token"]["seconds"]["median"]
    return {"length": length, "prefilled": length - tail, "turns": turns, "fastest_dense": fastest, "ways": table}


def contexts(tokenizer, length: int, count: int, questions: int) -> list:
    return [haystack(tokenizer, length - ROOM, needles=questions, seed=i) for i in range(count)]


def accuracy(told: list[dict]) -> float:
    return sum(sum(p["right"]) for p in told) / sum(len(p["right"]) for p in told)


def find_length(pieces: Pieces, model, tokenizer, lengths, count: int, questions: int) -> tuple[int | None, dict]:
    """Part 2. (the length, or None where dense answers enough at none; dense's share at each one tried)."""
    dense, tried = Way("dense"), {}
    for length in lengths:
        hays = contexts(tokenizer, length, count, questions)
        told = []
        for i, hay in enumerate(hays):
            told.append(pieces.get(f"needles-{length}-{questions}-{i}", dense, lambda h=hay: needles(model, dense, h)))
            if i == min(3, count) - 1 and accuracy(told) < ENOUGH - 0.1:
                break
        tried[length] = {"accuracy": accuracy(told), "contexts": len(told)}
        print(f"dense answers {tried[length]['accuracy']:.1%} of {len(told)} contexts at {length} tokens", flush=True)
        if len(told) == count and tried[length]["accuracy"] >= ENOUGH:
            return length, tried
    return None, tried


def retrieval(pieces: Pieces, model, tokenizer, ways: list[Way], length: int, count: int, questions: int) -> dict:
    """Part 3."""
    hays = contexts(tokenizer, length, count, questions)
    found: dict[str, list[dict]] = {way.name: [] for way in ways}
    for i, hay in enumerate(hays):
        shift = i % len(ways)
        for way in [*ways[shift:], *ways[:shift]]:
            step = way.name in STEPWISE
            name = f"needles-{length}-{questions}-{i}"
            found[way.name].append(pieces.get(name, way, lambda w=way, h=hay, s=step: needles(model, w, h, s)))
    shares = {name: [sum(p["right"]) / len(p["right"]) for p in told] for name, told in found.items()}
    table = {}
    for way in ways:
        mine = found[way.name]
        told = {
            "retrieval": mean_of(shares[way.name]),
            "difference": mean_of([a - b for a, b in zip(shares[way.name], shares["dense"], strict=True)]),
            "stored": mine[0]["stored"], "settings": settings(way.name, length) if way.method else {},
        }  # fmt: skip
        if way.method is not None:
            ids = torch.cat([hays[0].context, hays[0].context[:, :8]], 1)
            told["pairs"] = pieces.get(f"pairs-{length}", way, lambda w=way, i=ids: _counts(model, w, i))
        table[way.name] = told
    return {"length": length, "prefilled": length - ROOM, "contexts": count, "questions": questions, "ways": table}


def _counts(model, way: Way, ids: torch.Tensor) -> dict:
    told = counted(model, way, ids, 8)
    return {k: getattr(told, k) for k in ("causal", "kept", "computed", "read", "dense_read")}


def bars(first: dict, asked: dict | None) -> dict:
    """The issue's bars: at least three methods faster than dense, and near it in retrieval."""
    dense = ("dense", "dense bfloat16")
    fast = [n for n, t in first["ways"].items() if n not in dense and t["over_fastest_dense"] > 1 and n in PREFILL]
    near = [n for n, t in asked["ways"].items() if n != "dense" and t["difference"]["value"] >= -NEAR] if asked else []
    return {"faster": fast, "within_5_points": near, "both": [n for n in fast if n in near],
            "met": len([n for n in fast if n in near]) >= 3}  # fmt: skip


def show(told: dict) -> None:
    first, asked = told["prefill"], told["retrieval"]
    print(f"\nPrefill of {first['prefilled']} tokens, float32; x dense: over the faster dense ({first['fastest_dense']})")
    print(f"{'':16}{'first token':>12}{'x dense':>9}{'decode ms':>11}{'x dense':>9}{'cache MiB':>11}")
    for name, t in first["ways"].items():
        token, step, held = t["first_token"]["seconds"]["median"], t["decode"], t["stored"] / 2**20
        row = f"{name:16}{token:>10.2f} s{t['over_fastest_dense']:>9.2f}"
        print(f"{row}{1000 * step['seconds']['median']:>11.1f}{step['ratio']['median']:>9.2f}{held:>11.1f}")
    if asked is None:
        print("\nretrieval: dense answers 70% at none of the lengths:", told["tried"])
        return
    print(f"\nRetrieval at {asked['length']} tokens, {asked['contexts']} contexts x {asked['questions']} questions")
    print(f"{'':16}{'right':>8}{'points from dense':>20}{'pairs kept':>12}{'read a token':>14}")
    for name, t in asked["ways"].items():
        diff, pairs = t["difference"], t.get("pairs", {})
        kept = f"{pairs['kept'] / pairs['causal']:.1%}" if pairs else ""
        read = f"{pairs['read'] / pairs['dense_read']:.1%}" if pairs else ""
        away = f"{100 * diff['value']:.1f} ± {100 * diff['stderr']:.1f}"
        print(f"{name:16}{t['retrieval']['value']:>8.1%}{away:>20}{kept:>12}{read:>14}")
    print("\nbars:", json.dumps(told["bars"]))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--length", type=int, default=LENGTHS[0], help="of the prefill part, and the longest one tried")
    ask.add_argument("--contexts", type=int, default=12)
    ask.add_argument("--questions", type=int, default=32)
    ask.add_argument("--turns", type=int, default=3)
    ask.add_argument("--methods", default=",".join((*PREFILL, *DECODE)))
    ask.add_argument("--asked", help="methods of the retrieval part; all of them by default")
    ask.add_argument("--only", choices=("prefill",), help="stop after this part, its pieces kept")
    ask.add_argument("--any", action="store_true", help="compare at the longest length even where dense answers less")
    given = ask.parse_args()
    usual = ask.parse_args([])
    full = all(getattr(given, key) == value for key, value in vars(usual).items() if key not in ("methods", "asked"))
    source = find("default")
    model, tokenizer = load(source)
    read_in(model)
    pieces = Pieces(files_hash(source))
    slugs = given.methods.split(",")
    asked_of = given.asked.split(",") if given.asked else slugs

    def ways(length: int, slugs: list[str]) -> list[Way]:
        return [Way("dense"), *(Way(slug, get(slug)(**settings(slug, length))) for slug in slugs)]

    lengths = [n for n in LENGTHS if n <= given.length] or [given.length]
    first = prefills(pieces, model, tokenizer, source, ways(given.length, slugs), given.length, given.turns, 17)
    if given.only:
        return
    length, tried = find_length(pieces, model, tokenizer, lengths, given.contexts, given.questions)
    if length is None and given.any:
        length = lengths[0]
    asked = None
    if length is not None:
        asked = retrieval(pieces, model, tokenizer, ways(length, asked_of), length, given.contexts, given.questions)
    engine = choose(torch.zeros(1, 1, 1, 64))
    told = {
        "prefill": first, "tried": tried, "retrieval": asked, "bars": bars(first, asked), "model": source.origin,
        "dense": model.config._attn_implementation, "engine": f"{engine.name} ({engine.reason})", "seed": 0,
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    show(told)
    if full:
        write_atomic(results_dir() / "attention_model.json", (to_json(told) + "\n").encode())


if __name__ == "__main__":
    main()
