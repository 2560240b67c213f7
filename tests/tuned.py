"""Folders for `maskwright merge`: a tiny base, models tuned from it, and what the tests ask of them."""

import json

import torch
from commands import run
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from maskwright.core.errors import BadInput


def refused(says, *args):
    result = run(*args)
    assert isinstance(result.exception, BadInput) and says in str(result.exception), (result.output, result.exception)


def tuned(base, folder, seed, shards=False):
    """A copy of the base's folder whose weights moved a little."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    rng = torch.Generator().manual_seed(seed)
    state = load_file(base / "model.safetensors")
    state = {n: (v.float() + 0.01 * torch.randn(v.shape, generator=rng)).to(v.dtype) for n, v in sorted(state.items())}
    names = list(state)
    if not shards:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {name: f"model-{1 + (i >= len(names) // 2):05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def states(*folders):
    out = []
    for folder in folders:
        out.append({})
        for file in sorted(folder.glob("*.safetensors")):
            out[-1] |= load_file(file)
    return out


def same(one, other):
    return sorted(one) == sorted(other) and all(torch.equal(one[n], other[n]) for n in one)


def three(root):
    """(base, a model tuned from it, another one in two shards)."""
    base = tiny_llama(root / "base")
    return base, tuned(base, root / "m1", 1), tuned(base, root / "m2", 2, shards=True)
