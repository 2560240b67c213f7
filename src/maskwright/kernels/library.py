"""The one place that declares torch's operator namespace `maskwright`; each kernel defines its operators in it."""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("maskwright", "DEF")
