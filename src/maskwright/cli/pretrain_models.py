"""The backbones that `pretrain` starts from: small ones by name, a transformers folder, or any function of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from maskwright.cli.named import made_by
from maskwright.core.errors import BadInput
from maskwright.core.select import generator
from maskwright.inputs import Learner
from maskwright.inputs.calling import trying
from maskwright.models.load import quiet

Build = Callable[[int, tuple[int, int]], nn.Module]  # (channels, (height, width)) -> a backbone


def backbone(name: str, channels: int, size: tuple[int, int], seed: int) -> nn.Module:
    """A model with fresh weights from `seed` (a folder that holds weights keeps them).

    name: small-resnet, small-convnext or small-vit (transformers' classes); a folder with a config.json; or
    `package.module:function`, called without arguments. Raises BadInput saying what is missing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in SMALL:
            return SMALL[name](channels, size)
        if (folder := Path(name).expanduser()).is_dir():
            return _from_folder(folder)
        if ":" in name:
            return made_by(name, "model")
    known = ", ".join(SMALL)
    raise BadInput(f"model {name!r}: not one of {known}, no folder, and not of the form package.module:function")


def _resnet(channels: int, size: tuple[int, int]) -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(
        num_channels=channels, embedding_size=32, hidden_sizes=[32, 64, 128], depths=[1, 1, 1], layer_type="basic",
    ))  # fmt: skip


def _convnext(channels: int, size: tuple[int, int]) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(
        num_channels=channels, patch_size=4, num_stages=3, hidden_sizes=[32, 64, 128], depths=[2, 2, 2],
    ))  # fmt: skip


def _vit(channels: int, size: tuple[int, int]) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    if size[0] != size[1]:
        raise BadInput(f"small-vit takes square images, got {size[0]} x {size[1]}: give --size")
    side = _patch(size[0])
    if side is None:
        near = sorted((n for n in range(4, 2 * size[0] + 8) if _patch(n)), key=lambda n: abs(n - size[0]))[:2]
        told = " or ".join(map(str, sorted(near)))
        raise BadInput(
            f"small-vit's patches, an eighth of the side or 4 pixels, do not divide {size[0]}: give --size {told}"
        )
    return ViTModel(ViTConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, image_size=size[0], patch_size=side, num_channels=channels,
    ), add_pooling_layer=False)  # fmt: skip


def _patch(side: int) -> int | None:
    return next((part for part in (side // 8, 4) if part and side % part == 0), None)


SMALL: Mapping[str, Build] = {"small-resnet": _resnet, "small-convnext": _convnext, "small-vit": _vit}


def _from_folder(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no config.json, so it is no model folder")
    try:
        with quiet():
            if any(folder.glob("*.safetensors")):
                return AutoModel.from_pretrained(folder, local_files_only=True)
            return AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:160]})") from None


def tried(learner: Learner, example: Tensor) -> None:
    """Ask everything of the learner once, in eval mode, of an image or two: nothing is to fail after long work."""
    with trying(learner):
        learner.loss(example, generator(0, "try"))
        learner.features(example)
        learner.reconstruct(example, generator(0, "try"))


def save_backbone(model: nn.Module, folder: Path, name: str) -> tuple[dict[str, str], str]:
    """Write the backbone so that it loads without maskwright. Gives the files, what each is, and how to load it."""
    if hasattr(model, "save_pretrained"):
        with quiet():
            model.save_pretrained(folder)  # type: ignore[operator]
        plain = ", add_pooling_layer=False" if getattr(model, "pooler", 0) is None else ""  # else it is made by chance
        files = {"config.json": "its class and sizes", "model.safetensors": "the backbone's weights"}
        return files, f"from transformers import AutoModel\nmodel = AutoModel.from_pretrained({str(folder.name)!r}{plain})"
    from safetensors.torch import save_file

    state = {key: value.detach().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, folder / "backbone.safetensors", metadata={"format": "pt"})
    made = f"{name.partition(':')[2]}()  # {name}" if ":" in name else "..."
    lines = f"from safetensors.torch import load_file\nmodel = {made}\n"
    lines += "model.load_state_dict(load_file('backbone.safetensors'))"
    return {"backbone.safetensors": "the backbone's weights, under its own names"}, lines
