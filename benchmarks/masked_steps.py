"""What a training step costs when 75% of the tokens are hidden, against the same step with nothing hidden.

A step is the forward, the backward and AdamW's update on one batch. The steps of a table are interleaved: each round
takes one of every kind, and ratios are taken within a round. Writes results/masked_steps.json: medians, the least and
the greatest ratio. Bar: the masked step at most 0.45 x the unmasked one. Run alone; one thread.
`--only PART` prints one part and writes nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from maskwright.core.mask import Mask
from maskwright.core.select import generator
from maskwright.inputs.mae import Mae
from maskwright.inputs.microdit import MicroDit
from maskwright.inputs.token_learner import TokenLearner
from maskwright.inputs.vit import SmallVit, encode

BAR, DENSITY, ROUNDS = 0.45, 0.25, 15
Step = Callable[[], Tensor]  # gives the loss

# name: image side, patch, width, layers, heads, batch
VITS = {
    "64 tokens, 6 layers of 128 (32 x 32, patch 4)": (32, 4, 128, 6, 4, 32),
    "196 tokens, 12 layers of 192 (ViT-Ti: 224 x 224, patch 16)": (224, 16, 192, 12, 3, 4),
}
# layers, how many times narrower than the encoder; the first is the rooms' default, the others are told beside it
DECODERS = ((2, 2), (1, 2), (4, 2), (2, 1))
# The diffusion transformer of XL/2's proportions at a quarter of its width: 14 blocks of 256, 256 tokens. Blocks of the
# mixer, 192 wide: 3 is the paper's share (6 beside 28); 0 is naive masking.
DIFFUSION, MIXERS = {"width": 256, "depth": 14, "mixer_width": 192, "multiple": 64, "experts": 0}, (3, 0, 6)


def timed(steps: dict[str, tuple[torch.nn.Module, Step]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, `rounds` times in turn, after two rounds that are not counted."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, (model, _) in steps.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(rounds + 2):
        for name, (_, loss) in steps.items():
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            loss().backward()
            optimizers[name].step()
            if at >= 2:
                taken[name].append(time.perf_counter() - start)
    return taken


def compared(taken: dict[str, list[float]], masked: str, whole: str) -> dict[str, float | bool]:
    """Medians of two kinds of step and of their ratios within a round."""
    ratios = [a / b for a, b in zip(taken[masked], taken[whole], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "masked_s": statistics.median(taken[masked]), "unmasked_s": statistics.median(taken[whole]),
        "ratio": ratio, "ratio_min": min(ratios), "ratio_max": max(ratios), "within_bar": ratio <= BAR,
    }  # fmt: skip


def everything(learner: TokenLearner, images: Tensor) -> Tensor:
    """The same learner's loss with nothing hidden: every token is encoded, decoded and told."""
    encoder = learner.encoder
    tokens = encoder.embed(images)
    seen = encode(encoder, tokens, Mask(torch.ones(tokens.shape[:2], dtype=torch.bool)))
    return (learner.decoder(seen) - learner.target(images, encoder.patch)).square().mean()


def row(size: tuple[int, int, int, int, int, int], deep: int, narrow: int, rounds: int) -> dict[str, object]:
    """One size of encoder with one decoder of `deep` layers, `narrow` times narrower than the encoder."""
    side, patch, width, layers, heads, batch = size
    images, rng = torch.rand(batch, 3, side, side, generator=generator(0)), generator(1)
    method = Mae(density=DENSITY, decoder_layers=deep, decoder_width=width // narrow, decoder_heads=heads)
    masked, whole = (
        method.learner(SmallVit(side, patch, width=width, layers=layers, heads=heads), images[:1]) for _ in range(2)
    )
    alone = SmallVit(side, patch, width=width, layers=layers, heads=heads)
    steps: dict[str, tuple[torch.nn.Module, Step]] = {
        "masked": (masked, lambda: masked.loss(images, rng)),
        "whole": (whole, lambda: everything(whole, images)),
        "encoder": (alone, lambda: alone(images).square().mean()),
    }
    taken = timed(steps, rounds)
    return {
        "against_same_learner": compared(taken, "masked", "whole"),
        "against_encoder_alone": compared(taken, "masked", "encoder"),
        "default": (deep, narrow) == DECODERS[0],
    }


def vit(rounds: int) -> dict[str, object]:
    """MAE's step for each size of encoder and decoder; the encoder alone on all tokens beside it (no decoder at all)."""
    told: dict[str, dict[str, dict[str, object]]] = {}
    for name, size in VITS.items():
        told[name] = {
            f"decoder of {deep} layers, width {size[2] // narrow}": row(size, deep, narrow, rounds)
            for deep, narrow in DECODERS
        }
    judged = [one["against_same_learner"] for rows in told.values() for one in rows.values() if one["default"]]
    return {"holds": all(one["within_bar"] for one in judged), "tables": told}  # type: ignore[index]


def diffusion(rounds: int) -> dict[str, object]:
    """Micro-diffusion's step for each depth of the mixer, on latents (4, 32, 32) in patches of 2; batches of 8."""
    x, y = 0.9 * torch.randn(8, 4, 32, 32, generator=generator(0)), torch.arange(8)
    tables: dict[str, dict[str, float | bool]] = {}
    for deep in MIXERS:
        steps: dict[str, tuple[torch.nn.Module, Step]] = {}
        for name, density in (("masked", DENSITY), ("whole", 1.0)):
            model = MicroDit(density=density, mixer_depth=deep, **DIFFUSION).denoiser((4, 32, 32), classes=10).train()  # type: ignore[arg-type]
            steps[name] = (model, partial(model.loss, x, y, generator(1)))
        tables[f"mixer of {deep} blocks, width 192"] = compared(timed(steps, rounds), "masked", "whole")
    return {"holds": tables[f"mixer of {MIXERS[0]} blocks, width 192"]["within_bar"], "tables": tables}


# A part gives {"holds": bool, ...}: whether the bar is met by its defaults, and what it measured. Append others here.
PARTS: dict[str, Callable[[int], dict[str, object]]] = {
    "vit": vit,
    "diffusion": diffusion,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.only:
        print(json.dumps(PARTS[asked.only](asked.rounds), indent=1))
        return
    from maskwright.core.cache import write_atomic
    from maskwright.lab.record import machine, results_dir, to_json, versions

    parts = {}
    for name, part in PARTS.items():
        parts[name] = part(asked.rounds)
        print(f"{name}: {'within' if parts[name]['holds'] else 'above'} the bar of {BAR}", flush=True)
    result = {"bar": BAR, "density": DENSITY, "rounds": asked.rounds, "parts": parts}
    result |= {"holds": all(part["holds"] for part in parts.values()), "versions": versions(), "machine": machine()}
    write_atomic(results_dir() / "masked_steps.json", (to_json(result) + "\n").encode())


if __name__ == "__main__":
    main()
