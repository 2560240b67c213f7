"""Sparse models run from packed weights: the same outputs, the form that was measured faster, files and commands."""

import copy
import json
import shutil

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import nn

import maskwright
from maskwright.core.errors import BadInput
from maskwright.kernels.packed_linear import LoopLinear, PackedLinear
from maskwright.models.load import find, load
from maskwright.models.packed_model import is_packed, load_packed
from maskwright.models.packing import write
from maskwright.weights import accelerated
from maskwright.weights.accelerated import accelerate, rows
from maskwright.weights.speed import Known, Speed

NEVER = 1 << 62


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A folder whose linear layers in the blocks keep half their weights; q, k and v have biases."""
    folder = tiny_llama(tmp_path_factory.mktemp("sparse") / "tiny", torch.float32, attention_bias=True)
    path = folder / "model.safetensors"
    made = torch.Generator().manual_seed(1)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            tensors[name] = tensor.masked_fill(torch.rand(tensor.shape, generator=made) < 0.5, 0.0)
        elif name.endswith("bias"):
            tensors[name] = torch.randn(tensor.shape, generator=made) * 0.1
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def model(sparse):
    return load(find(str(sparse)))[0].requires_grad_(False)


def logits(model):
    with torch.inference_mode():
        return model(input_ids=torch.arange(24)[None] * 7 % 300).logits


def fixed(monkeypatch, **times):
    """Speeds as told instead of measured."""
    monkeypatch.setattr(accelerated, "layer_speed", lambda weight, forms, dense, batch: Speed(
        {name: times[name] for name in ("torch", "loop", *forms)} | dict.fromkeys(dense, 9.0), NEVER))  # fmt: skip
    monkeypatch.setattr(Known, "get", lambda self, key: None)
    monkeypatch.setattr(Known, "put", lambda self, key, speed: None)


def test_the_same_outputs_from_packed_weights(model):
    before = logits(model)
    told = accelerate(model, force=True)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 4 * 7 == len(told.layers) == len(told.packed) and "28 of 28 linear layers run packed" in str(told)
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
    assert all(layer.bytes < 0.75 * layer.dense_bytes for layer in told.layers)  # small rows: 8 bytes of offset each
    assert type(model.lm_head) is nn.Linear  # tied to the embedding: left alone
    assert sum(row["number"] for row in rows(told)) == 28


def test_generation_is_the_same_text(model):
    ids = torch.arange(10)[None]
    mask = torch.ones_like(ids)
    how = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "pad_token_id": 1, "eos_token_id": None}
    dense = model.generate(ids, **how)
    accelerate(model, force=True)
    assert torch.equal(model.generate(ids, **how), dense)


@pytest.mark.parametrize(
    ("times", "kind", "form"),
    [
        ({"torch": 1.0, "loop": 2.0, "bitmask": 1.04}, PackedLinear, "bitmask"),  # as good, and half the memory
        ({"torch": 1.0, "loop": 2.0, "bitmask": 1.10}, nn.Linear, "torch"),
        ({"torch": 2.0, "loop": 1.0, "bitmask": 1.10}, LoopLinear, "loop"),
    ],
)
def test_the_faster_form_is_taken(model, monkeypatch, times, kind, form):
    before = logits(model)
    fixed(monkeypatch, **times)
    told = accelerate(model)
    assert {layer.form for layer in told.layers} == {form}
    assert type(model.model.layers[0].mlp.up_proj) is kind
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
    says = "as fast as dense" if form == "bitmask" else "dense is faster here"
    assert says in told.layers[0].verdict


def test_a_low_density_offers_the_index_and_minus_zeros_take_no_room(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64))
    weight = model[0].weight.data
    weight.mul_(torch.rand(weight.shape) < 0.1)  # leaves -0.0 where a negative weight was
    assert (torch.signbit(weight) & (weight == 0)).any()
    before = model(torch.ones(3, 256))
    fixed(monkeypatch, torch=1.0, loop=1.0, bitmask=0.9, indexed=0.5)
    (layer,) = accelerate(model).layers
    assert layer.form == "indexed" and abs(layer.density - 0.1) < 0.02 and layer.ratio == 2.0
    assert torch.allclose(model(torch.ones(3, 256)), before, atol=1e-5)


def test_int8_values_and_transposed_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=32)).eval()
    model.requires_grad_(False)
    for block in model.transformer.h:
        for part in (block.attn.c_attn, block.mlp.c_fc):
            part.weight.masked_fill_(torch.rand(part.weight.shape) < 0.6, 0.0)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert len(accelerate(model, force=True).packed) == 4
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
    accelerate(twin, values=torch.int8, force=True)
    assert twin.transformer.h[0].mlp.c_fc.values.dtype == torch.int8
    assert torch.allclose(logits(twin), before, atol=0.05) and not torch.allclose(logits(twin), before, atol=1e-6)


def test_what_is_dense_is_refused_and_says_how_dense():
    with pytest.raises(BadInput, match=r"not sparse: the sparsest linear layer keeps 1\.0000"):
        accelerate(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))


def test_speeds_are_measured_once_and_kept(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path))
    said = []
    accelerate(copy.deepcopy(model), say=said.append)
    kinds = len(said)
    assert kinds and all("timing" in text for text in said)
    accelerate(copy.deepcopy(model), say=said.append)
    assert len(said) == kinds
    accelerate(copy.deepcopy(model), say=said.append, remeasure=True)
    assert len(said) == 2 * kinds
    Known().path.write_text("[1, 2")
    accelerate(copy.deepcopy(model), say=said.append)
    assert len(said) == 3 * kinds


def test_a_packed_folder_loads_packed_and_runs_the_same(sparse, model, tmp_path):
    write(sparse, tmp_path / "packed")
    assert is_packed(tmp_path / "packed") and not is_packed(sparse)
    with pytest.raises(BadInput, match="maskwright unpack"):
        load(find(str(tmp_path / "packed")))
    loaded, tokenizer = load_packed(tmp_path / "packed")
    assert tokenizer is not None and not loaded.training
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 28
    assert torch.allclose(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)
    told = accelerate(loaded, force=True)
    assert len(told.layers) == 28
    assert torch.allclose(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_a_packed_folder_that_does_not_fit_its_config_is_refused(sparse, tmp_path):
    write(sparse, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    for change, says in (({"num_hidden_layers": 5}, "lacks"), ({"num_hidden_layers": 3}, "has no"),
                         ({"hidden_size": 64}, "shape")):  # fmt: skip
        shutil.copytree(tmp_path / "packed", tmp_path / says)
        (tmp_path / says / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BadInput, match=says):
            load_packed(tmp_path / says)


def test_generate_and_bench_from_the_command_line(sparse, tmp_path):
    assert run("pack", sparse, tmp_path / "packed").exit_code == 0
    texts = []
    for folder, more in ((sparse, ["--dense"]), (sparse, ["--packed"]), (tmp_path / "packed", [])):
        done = run("generate", folder, "--prompt", "the module", "--tokens", 8, "--json", *more)
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        texts.append(told["text"])
        assert told["tokens"] <= 8 and told["resident_bytes"] > 0 and bool(told["layers"]) == ("--dense" not in more)
    assert texts[0] == texts[1] == texts[2]
    done = run("bench", tmp_path / "packed", "--tokens", 2, "--rounds", 1, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {"dense float32", "fastest forms", "all packed", "dense bfloat16"} == set(told["model"])
    assert {row["kind"] for row in told["layers"]} >= {"self_attn.q_proj", "mlp.down_proj"}
    done = run("bench", sparse, "--tokens", 2, "--rounds", 1, "--batch", 3)
    assert done.exit_code == 0 and "whole model, all packed:" in done.stdout and "mlp.down_proj" in done.stdout


def test_commands_refuse_what_they_cannot_run(sparse, tmp_path):
    assert run("generate", sparse, "--prompt", "x", "--values", "float8").exit_code == 2
    assert isinstance(run("generate", tmp_path, "--prompt", "x").exception, BadInput)
    dense = tiny_llama(tmp_path / "dense")
    done = run("bench", dense)
    assert isinstance(done.exception, BadInput) and "not sparse" in str(done.exception)
    (dense / "tokenizer.json").unlink()
    done = run("generate", dense, "--prompt", "x")
    assert isinstance(done.exception, BadInput) and "tokenizer" in str(done.exception)


def test_forms_are_timed_on_the_batch_that_will_run(model, monkeypatch):
    seen = []

    def timed(weight, forms, dense, batch):
        seen.append(batch)
        return Speed({"torch": 1.0, "bitmask": 0.5 if batch == 1 else 2.0, **dict.fromkeys(dense, 9.0)}, NEVER)

    monkeypatch.setattr(accelerated, "layer_speed", timed)
    monkeypatch.setattr(Known, "get", lambda self, key: None)
    monkeypatch.setattr(Known, "put", lambda self, key, speed: None)
    assert not accelerate(copy.deepcopy(model), batch=8).packed and set(seen) == {8}
    assert len(accelerate(model).packed) == 28


def test_the_top_level_names():
    assert maskwright.accelerate is accelerate
