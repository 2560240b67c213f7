"""Whisper tiny.en from a CTranslate2 file: a reader for that format, and the names transformers gives the weights.

The file (version 6, little-endian): version, name of the spec, revision; then each variable as name, rank, dims,
type, bytes; then aliases. Query, key and value are fused to one matrix (key and value in cross attention), the output
projection is the token embedding, and the key has no bias in Whisper (zeros stand in its place).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_VERSION = 6


def read_ct2(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of every variable in a CTranslate2 `model.bin`. Raises ValueError for any other file."""
    found = {}
    try:
        with path.open("rb") as file:
            version = _number(file, "I")
            if version != _VERSION:
                raise ValueError(f"version {version}, expected {_VERSION}")
            _name(file)
            _number(file, "I")
            for _ in range(_number(file, "I")):
                name = _name(file)
                shape = [_number(file, "I") for _ in range(_number(file, "B"))]
                kind, size = _number(file, "B"), _number(file, "I")
                found[name] = torch.from_numpy(np.frombuffer(file.read(size), _TYPES[kind]).reshape(shape).copy())
    except (struct.error, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CTranslate2 model this reader knows: {error}") from None
    return found


def state_dict(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The variables under the names of transformers' WhisperForConditionalGeneration, float32, fused parts cut."""
    v = {name: value.float() for name, value in variables.items() if value.dtype == torch.float16}
    out: dict[str, Tensor] = {}
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            out[f"model.encoder.{conv}.{part}"] = v[f"encoder/{conv}/{part}"]
    out["model.decoder.embed_tokens.weight"] = v["decoder/embeddings/weight"]
    out["proj_out.weight"] = v["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        out[f"model.{side}.embed_positions.weight"] = v[f"{side}/position_encodings/encodings"]
        _norm(out, v, f"model.{side}.layer_norm", f"{side}/layer_norm")
        depth = sum(name.startswith(f"{side}/layer_") and name.endswith("ffn/linear_0/bias") for name in v)
        for index in range(depth):
            here, there = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            _attention(out, v, f"{here}.self_attn", f"{there}/self_attention", ("q_proj", "k_proj", "v_proj"))
            if side == "decoder":
                _attention(out, v, f"{here}.encoder_attn", f"{there}/attention", ("q_proj",), ("k_proj", "v_proj"))
            _linear(out, v, (f"{here}.fc1",), f"{there}/ffn/linear_0")
            _linear(out, v, (f"{here}.fc2",), f"{there}/ffn/linear_1")
            _norm(out, v, f"{here}.final_layer_norm", f"{there}/ffn/layer_norm")
    return out


def build(folder: Path) -> Any:
    """WhisperForConditionalGeneration (tiny.en, float32, eval) from a folder with model.bin and config.json."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    weights = state_dict(read_ct2(folder / "model.bin"))
    vocabulary, width = weights["proj_out.weight"].shape
    start, end = 50257, 50256  # the English-only vocabulary's <|startoftranscript|> and <|endoftext|>
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) - {"proj_out.weight"} or unexpected:
        raise ValueError(f"{folder}: weights do not fit Whisper tiny.en: {missing[:3]} {unexpected[:3]}")
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end, max_length=448,
        suppress_tokens=told["suppress_ids"], begin_suppress_tokens=told["suppress_ids_begin"],
        no_timestamps_token_id=50362, forced_decoder_ids=None, is_multilingual=False,
    )  # fmt: skip
    return model.eval()


def _attention(out: dict[str, Tensor], v: dict[str, Tensor], here: str, there: str, *fused: tuple[str, ...]) -> None:
    for index, parts in enumerate((*fused, ("out_proj",))):
        _linear(out, v, tuple(f"{here}.{part}" for part in parts), f"{there}/linear_{index}")
    _norm(out, v, f"{here}_layer_norm", f"{there}/layer_norm")


def _linear(out: dict[str, Tensor], v: dict[str, Tensor], here: tuple[str, ...], there: str) -> None:
    weights, biases = v[f"{there}/weight"].chunk(len(here)), v[f"{there}/bias"].chunk(len(here))
    for name, weight, bias in zip(here, weights, biases, strict=True):
        out[f"{name}.weight"] = weight.clone()
        if not name.endswith("k_proj"):
            out[f"{name}.bias"] = bias.clone()


def _norm(out: dict[str, Tensor], v: dict[str, Tensor], here: str, there: str) -> None:
    out[f"{here}.weight"], out[f"{here}.bias"] = v[f"{there}/gamma"], v[f"{there}/beta"]


def _number(file: BinaryIO, code: str) -> int:
    return int(struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0])


def _name(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()
