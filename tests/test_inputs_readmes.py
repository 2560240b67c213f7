"""The `Use` of every room of the inputs place: its names exist, and where that is cheap it runs, on tiny data."""

import ast
import builtins
import re

import pytest
import torch
from torch import nn

from maskwright.core.method import methods
from maskwright.core.select import generator
from maskwright.lab.decoder import llama

ROOMS = {card.slug: card.path / "README.md" for card in methods("inputs")}
X = torch.rand(6, 3, 32, 32, generator=generator(0))
LINE = nn.Linear(6, 4)
CLOUD = (torch.rand(80, 3, generator=generator(1)), torch.rand(80, 3), torch.arange(80) % 4, torch.zeros(80).long())


def net(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def small(frozen=False):
    return llama(11, layers=1, width=16, heads=2, kv_heads=1, hidden=16, context=16, seed=1).requires_grad_(not frozen)


def pairs():
    ids = torch.randint(1, 11, (4, 6), generator=generator(2))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}]


# What a snippet takes as given: the user's own, and `torch`. None: too large to run, its names are looked at only.
GIVEN = {
    "almguard": lambda: {
        "safety_loss": lambda x, number: 0.01 * x.square().mean(), "utility_loss": lambda x, number: x.square().sum(),
        "clips": [torch.rand(1, 50, 4)], "features": torch.rand(2, 50, 9),
    },
    "cpcm": lambda: {
        "net": lambda coords, feats, scene: LINE(torch.cat([coords, feats], 1)), "pairs": torch.arange(80).repeat(2, 1).T,
        **{f"{name}{view}": part for view in (1, 2) for name, part in zip("cfys", CLOUD, strict=True)},
    },
    "dmjd": lambda: {"torch": torch, "images": X, "rng": generator(0)},
    "dpo": lambda: {"policy": small(), "reference": small(frozen=True), "batches": pairs()},
    "l1_coding": lambda: {"patches": torch.rand(300, 144)},
    "mae": lambda: {"torch": torch, "images": X, "rng": generator(0)},
    "microdit": ("data", "noise", "captions"),
    "mid": lambda: {"clean": X, "noisy": X + 0.1 * torch.randn(X.shape), "build_network": net, "y": X},
    "salm": lambda: {
        "images": X, "labels": torch.arange(6) % 2, "publish": lambda images: None,
        "build_network": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)),
    },
    "spark": lambda: {"torch": torch, "images": X, "batches": [X], "seed": 0,
                      "backbone": nn.Sequential(net(3, 4), nn.MaxPool2d(2), net(4, 8), nn.MaxPool2d(2))},
    "sparsepo": lambda: {"torch": torch, "policy": small(), "reference": small(frozen=True), "batches": pairs()},
    "v1_sparse_coding": lambda: {"patches": torch.rand(300, 144)},
}  # fmt: skip
QUICKER = {
    "mid": ("density=0.25", "density=0.25, steps=1, rounds=1"),
    "salm": ("density=0.05", "density=0.05, rounds=1"),
    "l1_coding": ("lam=1.6", "lam=1.6, epochs=1"),
    "v1_sparse_coding": ("lam=1.0", "lam=1.0, epochs=1"),
}


def use(slug):
    text = ROOMS[slug].read_text(encoding="utf-8").partition("\n## Use\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.parametrize("slug", ROOMS)
def test_the_names_of_a_snippet_exist(slug):
    code = use(slug)
    assert code and slug in GIVEN, f"{slug}: say in GIVEN what its snippet takes as given"
    tree, given = ast.parse(code), GIVEN[slug]
    imports = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
    space = {}
    exec(compile(ast.Module(imports, []), slug, "exec"), space)
    made = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    known = set(given() if callable(given) else given)
    assert used <= made | known | set(space) | set(dir(builtins)), used - made - known - set(space)
    assert known <= used, known - used


@pytest.mark.parametrize("slug", [slug for slug in ROOMS if callable(GIVEN.get(slug))])
def test_a_snippet_runs(slug, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = use(slug)
    if slug in QUICKER:
        slow, quick = QUICKER[slug]
        assert code.count(slow) == 1
        code = code.replace(slow, quick)
    space = GIVEN[slug]()
    exec(compile(code, slug, "exec"), space)
