"""The README.md that `maskwright protect` lays beside the protected images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def protect_card(report: Mapping[str, Any]) -> str:
    """What was done, what it is for, and what it cannot do."""
    method, data, found = report["method"], report["data"], report["figures"]
    settings, (_, height, width) = method["settings"], data["shape"]
    title = f"{method['title']}" + (f", arXiv {method['arxiv']}" if method["arxiv"] else "")
    psnr = "" if found["psnr"] is None else f", PSNR {found['psnr']:.1f} dB"
    settled = (
        f"The surrogate's error on the protected images ended at {found['error']:.3f}, below {settings['stop']:g}."
        if report["settled"]
        else f"The surrogate's error on the protected images ended at {found['error']:.3f} and not below "
        f"{settings['stop']:g}: the noise is weaker than it could be; more rounds may help."
    )
    lines = [
        "# Protected images", "",
        f"{data['images']:,} images of {height} x {width} in {len(data['classes'])} classes, with noise that is meant to "
        f"keep networks from learning them. Made by `maskwright protect`, method {method['name']} ({title}).", "",
        f"In each image at most {report['pixels']:,} of {height * width:,} pixels differ from the original, no 8-bit value "
        f"by more than {report['levels']} of 255. {found['changed']:.2%} of all pixels changed{psnr}.",
        settled, "",
        "## Intended use", "",
        "For the owner of images who must publish them and does not want networks trained on them. Do not use it on other "
        "people's data, or to spoil a data set that others rely on. Say openly that these images carry noise, and keep the "
        "originals: a diagnosis is made on them, not on these.", "",
        "## Limits", "",
        "- It is not proven for these images: train a network on them and test it on clean ones before relying on it.",
        "- Whoever tries can weaken or undo it: blurring, JPEG or coarse colours, grey-scale, strong augmentation and "
        "adversarial training all work against such noise. Who has some clean images can learn from those.",
        "- It does not hide what an image shows, and gives no privacy: people see the same image.",
        "- It can fail where the classes differ in large or strong features, which are easier to learn than the noise.",
        "- Saving these PNG files in a lossy format, or scaling them, destroys part of the noise.", "",
    ]  # fmt: skip
    if data["skipped"]:
        lines[-1:] = [
            "",
            f"Left out because they could not be read: {len(data['skipped'])} files, named in report.json.",
            "",
        ]
    return "\n".join(lines)
