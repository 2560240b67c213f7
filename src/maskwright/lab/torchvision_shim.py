"""Make `import torchvision` work beside a CPU build of torch, when the wheel at hand was built for CUDA.

That wheel's `_C.so` wants CUDA libraries and is not loaded, and then the import fails on operators that nothing
declared ("operator torchvision::nms does not exist"); parts of transformers fail with it. Declaring the schemas is
enough for models and transforms. The operators themselves stay without code: `torchvision.ops.nms` raises.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import torch

_SIZES = "SymInt pooled_height, SymInt pooled_width"
_SHAPE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_ROI = f"(Tensor input, Tensor rois, float spatial_scale, {_SIZES}"
_DEFORM = "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, "
_DEFORM += "SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, SymInt offset_groups, "
_DEFORM += "bool use_mask"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align{_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"qroi_align{_ROI}, int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align{_ROI}, int sampling_ratio) -> (Tensor, Tensor)",
    f"roi_pool{_ROI}) -> (Tensor, Tensor)",
    f"ps_roi_pool{_ROI}) -> (Tensor, Tensor)",
    f"deform_conv2d({_DEFORM}) -> Tensor",
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, {_SIZES}, {_SHAPE}, "
    "int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, {_SIZES}, {_SHAPE}) -> Tensor",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    f"{_SIZES}, int sampling_ratio, {_SHAPE}) -> Tensor",
    "_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    f"{_SIZES}, {_SHAPE}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
# A Library takes its operators back when it is collected, so the module holds it for the life of the process.
_alive: list[torch.library.Library] = []


def install() -> Literal["absent", "real", "shim"]:
    """Declare torchvision's operators if its own library does not load. Call before the first import of torchvision.

    Gives "absent" (not installed: nothing done), "real" (its own operators load: nothing done) or "shim".
    Calling it again does nothing.
    """
    if _alive:
        return "shim"
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "absent"
    if _declared() or _loads(Path(spec.origin).parent):
        return "real"
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _alive.append(library)
    return "shim"


def _declared() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def _loads(folder: Path) -> bool:
    for path in sorted(folder.glob("_C*")):
        try:
            torch.ops.load_library(str(path))
        except (OSError, ImportError):
            continue
        if _declared():
            return True
    return False
