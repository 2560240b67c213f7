"""Deltas in other hands: the Hugging Face Trainer, PEFT's SHiRA, and the command line."""

import json
import warnings

import pytest
import torch
from commands import good, run
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import nn

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.updates import Delta, Deltas, add, delta, read_shira, write_shira

pytest.importorskip("transformers")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))


def sparse(model, share=0.15):
    found = {}
    for name in ("0.weight", "2.weight"):
        weight = model.get_parameter(name)
        where = (torch.rand(weight.numel(), generator=rng(len(found))) < share).nonzero().flatten()
        found[name] = Delta(tuple(weight.shape), where, torch.randn(len(where), generator=rng(5)))
    return Deltas(found)


def test_peft_loads_what_is_written_and_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    model, deltas = net(), sparse(net())
    write_shira(tmp_path / "a", deltas, base="mine")
    x = torch.randn(4, 8, generator=rng(1))
    with add(model, deltas):
        want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about what the config does not name
        loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "a")
        assert torch.allclose(loaded(x), want, atol=1e-6)
        loaded.save_pretrained(tmp_path / "b")
    shapes = {name: tuple(model.get_parameter(name).shape) for name in deltas}
    for folder in ("a", "b"):
        back = read_shira(tmp_path / folder, shapes)
        for name, d in deltas.items():
            assert torch.equal(back[name].indices, d.indices) and torch.equal(back[name].values, d.values)


def test_what_shira_cannot_hold_is_refused(tmp_path):
    deltas = sparse(net())
    for wrong, says in (
        (Deltas({"0.bias": Delta((12,), torch.tensor([1]), torch.ones(1))}), "0.bias is none"),
        (Deltas({}), "there is none"),
        (Deltas(deltas.deltas, {"head": torch.ones(2)}), "head is stored whole"),
        (
            Deltas({"0.weight": Delta((12, 8), torch.arange(90), torch.ones(90))}),
            r"r 5 needs 100 entries of a weight of shape \(12, 8\)",
        ),
    ):
        with pytest.raises(BadInput, match=says):
            write_shira(tmp_path / "x", wrong)
    write_shira(tmp_path / "a", deltas)
    with pytest.raises(BadInput, match=r"0.weight of shape \(2, 2\) has indices outside"):
        read_shira(tmp_path / "a", {"0.weight": (2, 2), "2.weight": (8, 12)})
    with pytest.raises(BadInput, match="not a readable adapter"):
        read_shira(tmp_path / "none", {})
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(BadInput, match="peft_type is 'LORA'"):
        read_shira(tmp_path / "a", {})


def test_the_trainer_moves_kept_entries_alone(tmp_path):
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    from maskwright.updates.huggingface import RestrictCallback

    model = LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path / "m", torch.float32))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    keep = torch.rand(model.get_parameter(name).shape, generator=rng()) < 0.2
    ids = torch.randint(2, 300, (16, 12), generator=rng(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        output_dir=str(tmp_path / "t"), max_steps=3, per_device_train_batch_size=4, learning_rate=0.05, weight_decay=0.3,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        logging_strategy="no",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Trainer's own
        trainer = Trainer(
            model=model, args=args, train_dataset=rows, callbacks=[RestrictCallback(MaskSet({name: Mask(keep)}), rest=False)]
        )
        trainer.train()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, start[n])}
    assert moved == {name}
    now = model.state_dict()[name]
    assert torch.equal(now[~keep], start[name][~keep]) and not torch.equal(now[keep], start[name][keep])
    assert all(not w._post_accumulate_grad_hooks for w in model.parameters())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("delta")
    base = tiny_llama(root / "base")
    (root / "tuned").mkdir()
    for path in base.iterdir():
        (root / "tuned" / path.name).write_bytes(path.read_bytes())
    state = load_file(base / "model.safetensors")
    for i, name in enumerate(sorted(state)):
        if "mlp" in name:
            moved = (torch.rand(state[name].shape, generator=rng(i)) < 0.3) * torch.randn(
                state[name].shape, generator=rng(i)
            )
            state[name] = (state[name].float() + 0.01 * moved).bfloat16()
    save_file(state, root / "tuned" / "model.safetensors", metadata={"format": "pt"})
    return base, root / "tuned"


def refused(says, *args):
    result = run(*args)
    assert isinstance(result.exception, BadInput) and says in str(result.exception), (result.output, result.exception)


def test_make_info_add_and_take_off(folders, tmp_path):
    base, tuned = folders
    told = json.loads(good("delta", "make", tuned, base, tmp_path / "d.safetensors", "--json"))
    one, other = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert told["entries"] == sum(int((one[n] != other[n]).sum()) for n in one) and told["tensors"] == 12
    assert json.loads(good("delta", "info", tmp_path / "d.safetensors", "--json")) == told
    assert "entries" in good("delta", "info", tmp_path / "d.safetensors")
    same = delta(other, one)
    assert Deltas.load(tmp_path / "d.safetensors").key == same.key
    good("delta", "add", base, tmp_path / "d.safetensors", tmp_path / "again", "--verify")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[n], other[n]) for n in other) and (tmp_path / "again" / "tokenizer.json").is_file()
    good("delta", "add", tuned, f"{tmp_path / 'd.safetensors'}:-1", tmp_path / "off", "--any-base")
    off = load_file(tmp_path / "off" / "model.safetensors")
    assert all(torch.allclose(off[n].float(), one[n].float(), atol=2e-4, rtol=1e-2) for n in one)
    refused("the delta was made for another base", "delta", "add", tuned, tmp_path / "d.safetensors", tmp_path / "x")
    refused("exists; --replace overwrites it", "delta", "make", tuned, base, tmp_path / "d.safetensors")
    refused("exists; --replace overwrites it", "delta", "add", base, tmp_path / "d.safetensors", tmp_path / "again")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))


def test_the_greatest_share_over_all_tensors(folders, tmp_path):
    base, tuned = folders
    good("delta", "make", tuned, base, tmp_path / "d.safetensors", "--density", 0.02, "--dtype", "bfloat16")
    d = Deltas.load(tmp_path / "d.safetensors")
    one, other = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    gaps = torch.cat([(other[n].float() - one[n].float()).abs().flatten() for n in one])
    assert d.count == round(0.02 * len(gaps)) and next(iter(d.values())).values.dtype == torch.bfloat16
    least = min(float(v.values.float().abs().min()) for v in d.values())
    assert int((gaps > least * 1.01).sum()) <= d.count
    assert (tmp_path / "d.safetensors").stat().st_size < (tuned / "model.safetensors").stat().st_size / 3


def test_tensors_stored_whole_and_export(folders, tmp_path):
    base, tuned = folders
    good("delta", "make", tuned, base, tmp_path / "d.safetensors", "--full", "model.norm.*", "--density", 0.02)
    d = Deltas.load(tmp_path / "d.safetensors")
    assert list(d.full) == ["model.norm.weight"]
    refused("is stored whole", "delta", "export", tmp_path / "d.safetensors", tmp_path / "peft")
    good("delta", "make", tuned, base, tmp_path / "e.safetensors", "--density", 0.02)
    good("delta", "export", tmp_path / "e.safetensors", tmp_path / "peft", "--base", base)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "SHIRA"
    refused("has no x.weight", "delta", "add", base, _other(tmp_path), tmp_path / "x")
    refused("density lies in (0, 1]", "delta", "make", tuned, base, tmp_path / "f", "--density", 0)
    refused("no such file", "delta", "info", tmp_path / "none")


def _other(tmp_path):
    Deltas({"x.weight": Delta((2, 2), torch.tensor([0]), torch.ones(1))}).save(tmp_path / "o.safetensors")
    return tmp_path / "o.safetensors"
