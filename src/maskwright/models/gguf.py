"""A GGUF file to a Hugging Face folder, tensor by tensor: no second copy of the model is ever in memory.

Run as `python -m maskwright.models.gguf FILE FOLDER`, in a process of its own, so that the caller's peak memory
is not the conversion's.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from maskwright.core.errors import BadInput


@contextmanager
def reading_once() -> Iterator[None]:
    """Inside, a file is parsed once and a name map built once, however often transformers asks (three and 397 times)."""
    import gguf

    with ExitStack() as stack:
        for name in ("GGUFReader", "get_tensor_name_map"):
            stack.enter_context(patch.object(gguf, name, cache(getattr(gguf, name))))
        yield


@reading_once()
def convert(source: Path, target: Path) -> None:
    """Write `target` (config, tokenizer, model.safetensors in float32). It appears whole or not at all.

    Raises BadInput for a file that is not GGUF, or an architecture transformers does not read.
    """
    with source.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise BadInput(f"{source}: not a GGUF file")
    import torch
    import transformers
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as reading

    transformers.logging.set_verbosity_error()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        try:
            parsed = reading.load_gguf_checkpoint(str(source), return_tensors=False)["config"]
        except (ValueError, KeyError, NotImplementedError) as error:
            raise BadInput(f"{source}: {' '.join(str(error).split())[:200]}") from None
        parsed.pop("_model_name_or_path", None)
        config = AutoConfig.for_model(**parsed)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        reader = GGUFReader(str(source))
        kind = reading.read_field(reader, "general.architecture")[0]
        processor = reading.TENSOR_PROCESSORS.get(kind, reading.TensorProcessor)(config=parsed)
        names = reading.get_gguf_hf_weights_map(model, processor)
        wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        entries: dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]] = {}
        for tensor in reader.tensors:
            name = names.get(tensor.name)
            if name not in wanted:
                continue
            entries[name] = (wanted[name], _reader(tensor, dequantize, processor, parsed))
        tied = getattr(config, "tie_word_embeddings", False)
        missing = [n for n in wanted if n not in entries and not (tied and n == "lm_head.weight")]
        if missing:
            raise BadInput(f"{source}: holds no tensor for {', '.join(missing[:3])}")
        write_safetensors(work / "model.safetensors", entries)
        config.architectures = [type(model).__name__]
        config.dtype = torch.float32
        config.save_pretrained(work)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(work)
        if target.exists():
            shutil.rmtree(target)
        work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _reader(tensor: Any, dequantize: Any, processor: Any, parsed: Mapping[str, Any]) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        weights = dequantize(tensor.data, tensor.tensor_type)
        done = processor.process(weights=weights, name=tensor.name, parsed_parameters={"config": parsed, "tensors": {}})
        return np.ascontiguousarray(done.weights, dtype=np.float32)

    return read


def write_safetensors(path: Path, entries: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]) -> None:
    """A float32 .safetensors whose tensors are made one at a time. Raises BadInput when one has another shape."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, _) in entries.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, read) in entries.items():
            value = read()
            if value.shape != shape:
                raise BadInput(f"{name}: the file holds shape {value.shape}, the model wants {shape}")
            handle.write(value.data)
        handle.flush()
        os.fsync(handle.fileno())


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except BadInput as error:
        sys.exit(f"maskwright: {error}")
