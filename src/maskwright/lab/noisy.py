"""Real noise for MID's report: frames of a still camera (opencv-doc's vtest.avi) and a diffusion MRI slice (DIPY's).

Both give noisy patches of one part, and other noisy patches with their truth, for scoring only, of another part.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from maskwright.core.select import generator
from maskwright.lab.sources import SourceMissing, fetch_debian, fetch_pypi
from maskwright.lab.volumes import volume

VIDEO, DECODER, DIFFUSION = "opencv-doc", "imageio-ffmpeg==0.6.0", "dipy==1.12.1"
_ROWS, _COLUMNS, _STEP = 576, 768, 8  # of vtest.avi; every eighth of its 795 frames
_STILL = 32 / 255  # a patch with a pixel farther from the median than this holds something that moves


@dataclass(frozen=True, eq=False)
class Real:
    """Patches (n, 1, side, side): `noisy` to learn from; `test` to restore and its `truth`, of another part."""

    noisy: Tensor
    test: Tensor
    truth: Tensor


@cache
def frames(seed: int, side: int = 40) -> Real:
    """Still patches of single frames, grey in [0, 1], truth the temporal median; noisy left half, test right half."""
    video = _video()
    median = video.median(0).values
    moved = (video - median).abs()
    rng = generator(seed, "mid frames")
    sets = []
    for first, number in ((0, 60), (_COLUMNS // 2, 30)):
        found: list[tuple[Tensor, Tensor]] = []
        while len(found) < number:
            frame = int(torch.randint(len(video), (), generator=rng))
            row = int(torch.randint(_ROWS - side + 1, (), generator=rng))
            column = first + int(torch.randint(_COLUMNS // 2 - side + 1, (), generator=rng))
            at = slice(row, row + side), slice(column, column + side)
            if float(moved[frame][at].max()) < _STILL:
                found.append((video[frame][at], median[at]))
        sets.append([torch.stack(part).unsqueeze(1) for part in zip(*found, strict=True)])
    return Real(sets[0][0], *sets[1])


@cache
def diffusion(seed: int, side: int = 32) -> Real:
    """Patches of one brain slice in 12 gradient directions, 1 = the value 0.2% pass; noisy front, test back of the head.

    There is no repeat of a direction: the truth is the mean over the other 11, which differ in contrast, too.
    """
    slices = _slices()
    top = float(np.percentile(slices.numpy(), 99.8))
    slices = slices / top
    rng = generator(seed, "mid diffusion")
    sets = []
    for first, number in ((12, 60), (47, 30)):  # the brain fills rows 12 to 81 and columns 22 to 73
        found = []
        for _ in range(number):
            direction = int(torch.randint(len(slices), (), generator=rng))
            row = first + int(torch.randint(35 - side + 1, (), generator=rng))
            column = 20 + int(torch.randint(56 - side + 1, (), generator=rng))
            patch = slices[:, row : row + side, column : column + side]
            found.append((patch[direction], (patch.sum(0) - patch[direction]) / (len(slices) - 1)))
        sets.append([torch.stack(part).unsqueeze(1) for part in zip(*found, strict=True)])
    return Real(sets[0][0], *sets[1])


@cache
def _video() -> Tensor:
    """(frames, rows, columns) in [0, 1], decoded by the ffmpeg inside imageio-ffmpeg."""
    path = fetch_debian(VIDEO) / "usr/share/doc/opencv-doc/examples/data/vtest.avi"
    found = sorted((fetch_pypi(DECODER) / "imageio_ffmpeg" / "binaries").glob("ffmpeg-*"))
    if len(found) != 1 or not path.is_file():
        raise SourceMissing(f"vtest.avi or its decoder is missing: {path}, {DECODER} holds {len(found)} decoders")
    found[0].chmod(0o755)  # unpacking a wheel drops the right to run
    command = [str(found[0]), "-v", "error", "-i", str(path), "-vf", f"framestep={_STEP}"]
    done = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "gray", "-"], capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout or len(done.stdout) % (_ROWS * _COLUMNS):
        raise SourceMissing(f"{path.name} cannot be decoded: {done.stderr.decode(errors='replace').strip()[:100]}")
    pixels = np.frombuffer(done.stdout, np.uint8).reshape(-1, _ROWS, _COLUMNS)
    return torch.from_numpy(pixels.astype(np.float32) / 255)


@cache
def _slices() -> Tensor:
    """(12, 96, 96): the diffusion-weighted images of DIPY's slice; its first two, b = 0, are left out."""
    return volume(fetch_pypi(DIFFUSION) / "dipy/data/files/test_piesno.nii.gz")[:, :, 2:].permute(2, 0, 1)
