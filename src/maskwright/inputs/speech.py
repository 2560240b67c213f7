"""Speech for masks on mel bins: wave files read with their rate checked, and the bins that a rate can fill."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskwright.core.errors import BadInput


def read_wave(path: Path | str, rate: int) -> Tensor:
    """Samples (n,) float32 in [-1, 1) of a mono wave file of 16 bits.

    Raises BadInput for audio of another rate (it is not resampled behind your back), for several channels, another width,
    no samples, and a file that is no wave file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            found, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise BadInput(f"{path} is not a readable wave file: {error or 'cut short'}") from None
    if found != rate:
        raise BadInput(f"{path} has a rate of {found} Hz, asked were {rate}: resample it first")
    if (channels, width) != (1, 2) or not raw or len(raw) % 2:
        raise BadInput(f"{path} is not 16-bit mono with samples: {channels} channels, {8 * width} bits, {len(raw)} bytes")
    return torch.from_numpy(np.frombuffer(raw, "<i2").astype(np.float32) / 32768)


def doubled(samples: Tensor) -> Tensor:
    """The same sound at twice the rate, (n,) -> (2 n,): its spectrum, with nothing above. Raises BadInput for no samples."""
    if samples.ndim != 1 or not len(samples):
        raise BadInput(f"samples have shape (n,), n at least 1, got {tuple(samples.shape)}")
    return torch.fft.irfft(2 * torch.fft.rfft(samples), n=2 * len(samples))


def bins_below(filters: Tensor, rate: int, limit: float) -> int:
    """How many mel bins, from the lowest on, lie wholly below `limit` Hz.

    filters: (frequencies, bins), frequencies evenly from 0 to rate / 2, as feature extractors hold them. Speech that was
    recorded at 8 kHz leaves the bins above 4 kHz empty, and a mask must not count them. Raises BadInput where it is none.
    """
    if filters.ndim != 2 or len(filters) < 2:
        raise BadInput(f"mel filters have shape (frequencies, bins), got {tuple(filters.shape)}")
    above = torch.linspace(0, rate / 2, len(filters), dtype=torch.float64) >= limit
    free = ~(filters[above] > 0).any(0)
    count = int(free.long().cumprod(0).sum())
    if not count:
        raise BadInput(f"no mel bin of {filters.shape[1]} lies wholly below {limit:g} Hz")
    return count
