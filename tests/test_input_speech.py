import math
import wave

import pytest
import torch

from maskwright.core.errors import BadInput
from maskwright.inputs.speech import bins_below, doubled, read_wave


def write(path, samples, rate=8000, channels=1, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples)
    return path


def test_samples_by_hand(tmp_path):
    raw = b"\x00\x00\x00\x40\x00\x80\xff\x7f"  # 0, 2^14, -2^15, 2^15 - 1, little-endian
    found = read_wave(write(tmp_path / "a.wav", raw), 8000)
    assert found.dtype == torch.float32
    assert found.tolist() == [0, 0.5, -1, 32767 / 32768]


def test_audio_of_another_rate_is_refused(tmp_path):
    path = write(tmp_path / "a.wav", b"\x00\x00" * 9, rate=16000)
    with pytest.raises(BadInput, match="a.wav has a rate of 16000 Hz, asked were 8000"):
        read_wave(path, 8000)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"channels": 2, "samples": b"\x00" * 8}, "2 channels"),
        ({"width": 1, "samples": b"\x00" * 8}, "8 bits"),
        ({"samples": b""}, "0 bytes"),
    ],
)
def test_other_formats_are_refused(tmp_path, how, told):
    with pytest.raises(BadInput, match=told):
        read_wave(write(tmp_path / "a.wav", **how), 8000)


@pytest.mark.parametrize("raw", [b"", b"RIFF", b"no wave file at all, but long enough to be one " * 3])
def test_a_file_that_is_no_wave_file_is_refused(tmp_path, raw):
    (tmp_path / "a.wav").write_bytes(raw)
    with pytest.raises(BadInput, match=r"a\.wav is not a readable wave file"):
        read_wave(tmp_path / "a.wav", 8000)
    with pytest.raises(BadInput, match=r"none\.wav"):
        read_wave(tmp_path / "none.wav", 8000)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 101])
def test_doubling_keeps_the_samples_and_a_tone(n):
    samples = torch.randn(n, generator=torch.Generator().manual_seed(n))
    found = doubled(samples)
    assert found.shape == (2 * n,)
    if n % 2:  # with an even count the highest frequency has no phase of its own
        assert torch.allclose(found[::2], samples, atol=1e-5)
    t = torch.arange(80)
    tone = doubled(torch.sin(2 * math.pi * 5 * t / 80))
    assert torch.allclose(tone, torch.sin(2 * math.pi * 5 * torch.arange(160) / 160), atol=1e-5)
    with pytest.raises(BadInput, match="at least 1"):
        doubled(samples[:0])


def test_only_bins_wholly_below_the_limit_count():
    filters = torch.zeros(5, 4)  # 0, 2000, 4000, 6000, 8000 Hz
    filters[0, 0] = filters[1, 1] = filters[1, 2] = filters[2, 2] = filters[3, 3] = 1.0
    assert bins_below(filters, 16000, 4000) == 2
    assert bins_below(filters, 16000, 4001) == 3
    assert bins_below(filters, 16000, 9000) == 4
    with pytest.raises(BadInput, match="no mel bin of 4 lies wholly below 0 Hz"):
        bins_below(filters, 16000, 0)


def test_whispers_bins_below_four_kilohertz():
    from transformers import WhisperFeatureExtractor

    filters = torch.from_numpy(WhisperFeatureExtractor().mel_filters)
    assert filters.shape == (201, 80)
    assert bins_below(filters, 16000, 4000) == 61
