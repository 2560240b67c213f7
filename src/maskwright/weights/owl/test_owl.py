import pytest
import torch

from maskwright.core.budget import owl_densities
from maskwright.core.errors import BadInput
from maskwright.core.maskset import MaskSet
from maskwright.lab.models import CharLM
from maskwright.weights import sites
from maskwright.weights.owl import Owl
from maskwright.weights.solve import survey
from maskwright.weights.wanda import Wanda


def lm() -> tuple[CharLM, list[torch.Tensor]]:
    model = CharLM(seed=0, vocabulary=20, width=16, layers=3, heads=2, context=8)
    with torch.no_grad():
        for block, module in enumerate(model.blocks):
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter[:, : 1 + block] *= 12  # the later the block, the more outliers
    return model, [torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))]


def by_block(model: CharLM, masks: MaskSet) -> list[float]:
    found = sites(model)
    blocks = [[masks[n] for n in masks if found[n].block == b] for b in range(3)]
    return [sum(m.count for m in ms) / sum(m.keep.numel() for m in ms) for ms in blocks]


def test_the_formula() -> None:
    # r = (0, 0.5, 1) * 2 lam, less its mean, plus the density
    found = owl_densities({"0": 1.0, "1": 2.0, "2": 3.0}, {"0": 10, "1": 10, "2": 10}, 0.5, 0.08)
    assert [round(d, 12) for d in found.values()] == [0.42, 0.5, 0.58]
    assert set(owl_densities({"0": 2.0, "1": 2.0}, {"0": 5, "1": 9}, 0.3, 0.2).values()) == {0.3}


def test_unequal_blocks_average_to_the_target() -> None:
    sizes = {"0": 100, "1": 300}
    found = owl_densities({"0": 0.0, "1": 4.0}, sizes, 0.5, 0.1)
    assert abs(sum(found[b] * sizes[b] for b in sizes) / 400 - 0.5) < 1e-12
    assert found["1"] - found["0"] == pytest.approx(0.2)


def test_lam_zero_is_wanda_with_uniform_densities() -> None:
    model, batches = lm()
    assert Owl(lam=0.0).masks(model, batches).equal(Wanda().masks(model, batches))


def test_blocks_with_more_outliers_keep_more_and_the_total_is_exact() -> None:
    model, batches = lm()
    method = Owl(density=0.4, lam=0.15)
    masks = method.masks(model, batches)
    _, shares = survey(model, method, batches, sites(model))
    found = sites(model)
    outliers = [next(s for n, s in shares.items() if found[n].block == b) for b in range(3)]
    densities = by_block(model, masks)
    assert len(set(outliers)) == 3
    assert sorted(range(3), key=outliers.__getitem__) == sorted(range(3), key=densities.__getitem__)
    assert max(densities) - min(densities) == pytest.approx(0.3, abs=0.01)
    assert masks.count == round(0.4 * masks.total)


def test_a_density_outside_its_range_is_refused() -> None:
    with pytest.raises(BadInput, match="owl asks density"):
        owl_densities({"0": 0.0, "1": 1.0}, {"0": 1, "1": 1}, 0.1, 0.2)
    with pytest.raises(BadInput):
        Owl(lam=-1.0)


def test_density_one_keeps_everything() -> None:
    model, batches = lm()
    assert Owl(density=1.0).masks(model, batches).density == 1.0
