"""Packed checkpoints: byte for byte there and back, masks obeyed, legacy forms read, every refusal one line."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask
from maskwright.core.maskset import MaskSet
from maskwright.core.pattern import NM
from maskwright.core.select import select
from maskwright.kernels.packed_linear import layout
from maskwright.models.checkpoint import Checkpoint
from maskwright.models.packed import PackedCheckpoint
from maskwright.models.packing import survey, write
from maskwright.models.unpacking import unpack


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    masks = {n: select(p.detach().abs(), NM(2, 4)) for n, p in model.named_parameters() if "proj" in n}
    for name, mask in masks.items():
        model.get_parameter(name).data.masked_fill_(~mask.keep, 0)
    return model, MaskSet(masks, {"method": "magnitude"})


def folder(llama, path, dtype=torch.float32, **more):
    """A pruned model as transformers saves it, with what usually lies beside."""
    model, masks = llama
    model.to(dtype).save_pretrained(path, **more)
    model.float()
    masks.save(path / "masks.safetensors")
    (path / "tokenizer.json").write_bytes(b"{}\r\n")
    for name in ("README.md", "report.html", "pytorch_model.bin", "other.safetensors.index.json.partial", ".hidden"):
        (path / name).write_text("old")
    return path


def files(path, *ends):
    return {p.name: p.read_bytes() for p in Path(path).iterdir() if p.name.endswith(ends or "")}


def refused(says, call, *args, **more):
    with pytest.raises(BadInput, match=says) as caught:
        call(*args, **more)
    assert str(caught.value).isprintable(), str(caught.value)
    return str(caught.value)


def sparse(path, **tensors):
    """A one-tensor-or-more checkpoint file. Half of `w` is 0."""
    path.parent.mkdir(exist_ok=True)
    w = torch.arange(1.0, 129).reshape(4, 32) * (torch.arange(32) % 2)
    save_file({"w": w, "b": torch.ones(3)} | tensors, path, {"format": "pt", "z": 'x"\n'})
    return path


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["whole", "shards"])
def test_a_model_folder_comes_back_byte_for_byte(llama, tmp_path, dtype, size, masked):
    source = folder(llama, tmp_path / "a", dtype, max_shard_size=size)
    report = write(source, tmp_path / "b", masks=llama[1] if masked else None)
    assert report.signs == 0 and all(w.packed_bytes < w.dense_bytes for w in report.weights)
    weights = files(tmp_path / "b", ".safetensors")
    assert report.after == sum(len(data) for name, data in weights.items() if name != "masks.safetensors")
    assert {"config.json", "generation_config.json", "tokenizer.json", "masks.safetensors"} <= set(files(tmp_path / "b"))
    assert not {"README.md", "report.html", "pytorch_model.bin", ".hidden"} & set(files(tmp_path / "b"))
    assert ("packed.safetensors" in weights) == (size == "1GB") and not any(name.startswith("model") for name in weights)
    told = json.loads((tmp_path / "b" / "config.json").read_text())["sparsity_config"]
    assert told == {"format": "sparse-bitmask", "global_sparsity": 0.5, "sparsity_structure": "2:4"}
    unpack(tmp_path / "b", tmp_path / "c")
    back = files(tmp_path / "c")
    assert back and all(files(source)[name] == data for name, data in back.items())
    assert set(files(source, ".safetensors", ".safetensors.index.json", "config.json", "tokenizer.json")) <= set(back)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c"}


def test_reading_gives_packed_and_dense_tensors(llama, tmp_path):
    source = folder(llama, tmp_path / "a", max_shard_size="20KB")
    write(source, tmp_path / "b", masks=llama[1])
    whole = {name: read() for name, _, read in Checkpoint(source).each()}
    held = PackedCheckpoint(tmp_path / "b")
    held.verify()
    assert set(held.weights) == set(llama[1]) and len(held.parts) > 1
    for name, weight in held.weights.items():
        packed = held.packed(name)
        assert torch.equal(layout.unpack(packed), whole.pop(name))
        assert (weight.kept, weight.packed_bytes, weight.shape) == (packed.kept, packed.nbytes, packed.shape)
        assert torch.equal(torch.from_numpy(layout.unpack_bits(packed.bitmask, packed.cols)), llama[1][name].keep)
    rest = {name: read() for name, read in held.dense()}
    assert set(rest) == set(whole) and all(torch.equal(rest[name], whole[name]) for name in rest)
    assert PackedCheckpoint(tmp_path / "b" / "packed.safetensors.index.json").weights == held.weights
    refused("holds no packed weight nope", held.packed, "nope")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        type(llama[0]).from_pretrained(tmp_path / "b")  # plain transformers does not fill in weights at random


def test_other_tools_read_the_file_and_each_tensor_is_aligned(tmp_path):
    odd = torch.ones(3, 5)
    odd[:, 1:] = 0
    source = sparse(
        tmp_path / "a" / "model.safetensors", odd=odd.bfloat16().repeat(1, 4), u=torch.ones(3, dtype=torch.uint8)
    )
    write(source, tmp_path / "b")
    write(source, tmp_path / "again")
    path = tmp_path / "b" / "packed.safetensors"
    assert files(tmp_path / "b") == files(tmp_path / "again") and set(files(tmp_path / "b")) == {path.name}
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    sizes = {"I64": 8, "F32": 4, "BF16": 2, "U8": 1}
    assert length % 8 == 0 and all(e["data_offsets"][0] % sizes[e["dtype"]] == 0 for e in header.values())
    assert meta["digest"] == hashlib.sha256(meta["maskwright"].encode() + data[8 + length :]).hexdigest()
    assert meta["maskwright"] == json.dumps(json.loads(meta["maskwright"]), sort_keys=True, separators=(",", ":"))
    told = load_file(path)
    assert set(told) == {f"{n}.{k}" for n in ("w", "odd") for k in ("shape", "compressed", "bitmask", "row_offsets")} | {
        "b",
        "u",
    }
    assert told["w.shape"].tolist() == [4, 32] and told["w.row_offsets"].tolist() == [0, 16, 32, 48]
    assert told["odd.compressed"].dtype == torch.bfloat16


def test_int8_gives_the_nearest_float32_and_a_fitting_header(tmp_path):
    source = sparse(tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text('{"hidden": "ü"}\r\n', newline="")
    report = write(tmp_path / "a", tmp_path / "b", "int8")
    assert [w.values for w in report.weights] == ["int8"] and "w.scale" in load_file(tmp_path / "b" / "packed.safetensors")
    unpack(tmp_path / "b", tmp_path / "c")
    one, two = load_file(source), load_file(tmp_path / "c" / "model.safetensors")
    assert torch.equal(two["w"], layout.unpack(layout.pack(one["w"], values=torch.int8))) and torch.equal(one["b"], two["b"])
    with safe_open(tmp_path / "c" / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt", "z": 'x"\n'}
    assert files(tmp_path / "a", "config.json") == files(tmp_path / "c", "config.json")


def test_another_dtype_stays_and_the_index_tells_the_new_size(llama, tmp_path):
    source = folder(llama, tmp_path / "a", max_shard_size="20KB")
    write(source, tmp_path / "b", "bfloat16", llama[1])
    unpack(tmp_path / "b", tmp_path / "c")
    one, two = (Checkpoint(tmp_path / at) for at in "ac")
    assert {n: f.name for n, f in one.where.items()} == {n: f.name for n, f in two.where.items()}
    told = {name: read() for name, _, read in two.each()}
    for name, _, read in one.each():
        assert torch.equal(told[name], read().bfloat16() if name in llama[1] else read())
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in told.values())


def test_without_a_mask_only_what_its_zeros_make_smaller_is_packed(tmp_path):
    zeros = torch.zeros(8, 32)
    more = {"dense": torch.ones(8, 32), "bad": zeros.clone().fill_diagonal_(torch.inf), "flat": torch.zeros(99),
            "double": zeros.double(), "whole": zeros.int(), "none": torch.zeros(0, 4), "empty": zeros}  # fmt: skip
    source = sparse(tmp_path / "a" / "model.safetensors", **more)
    for values in (None, "int8", "bfloat16", "float32"):
        assert [w.name for w in survey(source, values).weights] == ["empty", "w"]
    write(source, tmp_path / "b")
    unpack(tmp_path / "b" / "packed.safetensors", tmp_path / "c")
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == source.read_bytes()


def test_what_is_not_sparse_is_refused_with_its_share(tmp_path):
    weight = torch.ones(10, 10)
    weight[0, 0] = 0
    save_file({"a": weight, "b": torch.ones(10, 10)}, tmp_path / "m.safetensors")
    for values in (None, "int8"):
        said = refused("not sparse: 0.50% of its 200 weights are 0, at most 1.00% .in a.", write, tmp_path / "m.safetensors",
                       tmp_path / "o", values)  # fmt: skip
        assert said.startswith(str(tmp_path / "m.safetensors"))
    masks = MaskSet({"b": Mask(torch.ones(10, 10).bool())})
    refused("mask keeps 100 of 100 weights", write, tmp_path / "m.safetensors", tmp_path / "o", masks=masks)
    save_file({"a": torch.ones(4)}, tmp_path / "m.safetensors")
    refused("no float weight of 2 or more dims", write, tmp_path / "m.safetensors", tmp_path / "o")
    refused("float8", write, tmp_path / "m.safetensors", tmp_path / "o", "float8")
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors"}


def test_masks_decide_what_is_stored_and_must_hold(tmp_path):
    source = sparse(tmp_path / "a" / "model.safetensors", lone=torch.zeros(4, 32))
    keep = torch.zeros(4, 32, dtype=torch.bool)
    keep[:, 1::2] = True
    keep[0, 0] = True  # a kept zero
    write(source, tmp_path / "b", masks=MaskSet({"w": Mask(keep)}))
    held = PackedCheckpoint(tmp_path / "b")
    assert list(held.weights) == ["w"] and held.weights["w"].kept == int(keep.sum())
    keep[1, 1] = False
    said = refused("1 weights outside the mask are not 0", write, source, tmp_path / "c", masks=MaskSet({"w": Mask(keep)}))
    assert said.startswith(f"{source}: w: ")
    turned = MaskSet({"w": Mask(keep.T.contiguous())})
    refused(r"w: the checkpoint has shape \(4, 32\), the mask \(32, 4\)", write, source, tmp_path / "c", masks=turned)
    refused("no tensor for x", write, source, tmp_path / "c", masks=MaskSet({"x": Mask(keep)}))
    eight = sparse(tmp_path / "d.safetensors", w=torch.zeros(4, 32).to(torch.float8_e4m3fn))
    refused("w: F8_E4M3 of shape", write, eight, tmp_path / "c", masks=MaskSet({"w": Mask(keep)}))
    assert not (tmp_path / "c").exists()


def test_minus_zeros_outside_a_mask_are_counted(tmp_path):
    keep = torch.arange(64).reshape(2, 32) % 2 == 0
    save_file({"w": -torch.ones(2, 32) * keep}, tmp_path / "m.safetensors")
    assert write(tmp_path / "m.safetensors", tmp_path / "b", masks=MaskSet({"w": Mask(keep)})).signs == 32
    assert refused("not sparse", survey, tmp_path / "m.safetensors")  # as -0.0 is kept where no mask says otherwise


@pytest.mark.parametrize("prefix", ["lm.w", "w.weight", "a.lm.w.weight"])
def test_sites_are_found_under_other_prefixes(tmp_path, prefix):
    keep = torch.arange(64).reshape(2, 32) % 2 == 0
    save_file({prefix: torch.ones(2, 32) * keep}, tmp_path / "m.safetensors")
    site = prefix.partition(".")[2] if prefix != "w.weight" else "model.w.weight"
    assert [w.name for w in survey(tmp_path / "m.safetensors", masks=MaskSet({site: Mask(keep)})).weights] == [prefix]


def test_two_names_of_one_tensor_are_packed_each(llama, tmp_path):
    weight = torch.eye(32)
    save_file({"embed.weight": weight, "head.weight": weight.clone()}, tmp_path / "m.safetensors")
    assert len(write(tmp_path / "m.safetensors", tmp_path / "b").weights) == 2
    unpack(tmp_path / "b", tmp_path / "c")
    assert files(tmp_path / "c")["m.safetensors"] == (tmp_path / "m.safetensors").read_bytes()
    tied = MaskSet({"a.head.weight": Mask(weight.bool()), "b.head.weight": Mask(weight.bool())})
    refused("would both be head.weight", survey, tmp_path / "m.safetensors", masks=tied)


def test_names_that_unpack_could_not_write_are_refused(tmp_path):
    for name in ("weights", "a\n.safetensors"):
        refused("cannot be packed", write, sparse(tmp_path / name), tmp_path / "b")


def test_a_tensor_named_like_a_part_is_refused(tmp_path):
    source = sparse(tmp_path / "m.safetensors", **{"w.bitmask": torch.ones(2)})
    refused("do not go together", write, source, tmp_path / "b")


def test_out_is_refused_or_replaced_whole(tmp_path, monkeypatch):
    source = sparse(tmp_path / "a" / "model.safetensors").parent
    (tmp_path / "file").write_text("")
    refused("is a file", write, source, tmp_path / "file", replace=True)
    for out in (source, source / "in", tmp_path, tmp_path / "b" / ".." / "a"):
        refused("choose another", write, source, out, replace=True)
        refused("choose another", unpack, source, out, replace=True)
    write(source, tmp_path / "b")
    before = files(tmp_path / "b")
    refused("--replace", write, source, tmp_path / "b")
    monkeypatch.setattr(layout, "pack", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(source, tmp_path / "b", replace=True)
    assert files(tmp_path / "b") == before and {p.name for p in tmp_path.iterdir()} == {"a", "b", "file"}
    monkeypatch.undo()
    write(source, tmp_path / "b", "int8", replace=True)
    assert files(tmp_path / "b") != before
    unpack(tmp_path / "b", tmp_path / "c")
    unpack(tmp_path / "b", tmp_path / "c", replace=True)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c", "file"}


def test_wrong_damaged_and_missing_files(llama, tmp_path):
    source = folder(llama, tmp_path / "a", max_shard_size="20KB")
    packed = tmp_path / "b"
    write(source, packed, masks=llama[1])
    refused("no such file", PackedCheckpoint, tmp_path / "nothing")
    refused("not a packed checkpoint: no tensor", PackedCheckpoint, source)
    refused("has another format|a mask file", PackedCheckpoint, source / "masks.safetensors")
    refused("a packed checkpoint: `maskwright unpack`", Checkpoint, packed)
    refused("a packed checkpoint: `maskwright unpack`", write, packed, tmp_path / "c")
    shards = sorted(packed.glob("packed-*.safetensors"))
    refused("part 1 of", unpack, shards[0], tmp_path / "c")
    data = shards[1].read_bytes()
    for broken, says in ((data[:-1], "promises"), (data + b"x", "promises"), (data[:40], "claims"), (b"", "claims")):
        shards[1].write_bytes(broken)
        assert refused(says, unpack, packed, tmp_path / "c").startswith(str(shards[1]))
    shards[1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert refused("digest does not match", unpack, packed, tmp_path / "c").startswith(str(shards[1]))
    shards[1].write_bytes(shards[0].read_bytes())
    refused("lacks", unpack, packed, tmp_path / "c")
    shards[1].unlink()
    refused("is missing", unpack, packed, tmp_path / "c")
    index = packed / "packed.safetensors.index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {k: v for k, v in told["weight_map"].items() if v != shards[1].name}}))
    refused("not every part", unpack, packed, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_broken_config_is_refused_before_anything_is_written(tmp_path):
    source = sparse(tmp_path / "a" / "model.safetensors").parent
    for text in (b"[]", b"{", b"\xff"):
        (source / "config.json").write_bytes(text)
        assert str(source / "config.json") in refused("config.json", write, source, tmp_path / "b")


# --- compressed-tensors' own files


def legacy(weight, name, four=False):
    """The tensors that its `sparse-bitmask` (or, with `four`, `sparse-24-bitmask`) compressor writes."""
    packed = layout.pack(weight)
    values = packed.values.reshape(len(weight), -1) if four else packed.values
    out = {"shape": torch.tensor(weight.shape), "compressed": values, "bitmask": packed.bitmask}
    out |= {"shape": out["shape"].reshape(-1, 1)} if four else {"row_offsets": packed.row_offsets}
    return {f"{name}.{key}": value for key, value in out.items()}


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("name", ["model.up.weight", "model.up"])
@pytest.mark.parametrize("where", ["sparsity_config", "compression_config", "quantization_config"])
def test_legacy_checkpoints_are_read_and_unpacked(tmp_path, four, name, where):
    weight = torch.randn(6, 16).masked_fill(torch.tensor([1, 0, 0, 1] * 4).bool(), 0).bfloat16()
    source = tmp_path / "a"
    source.mkdir()
    save_file(legacy(weight, name, four) | {"norm": torch.ones(3)}, source / "model.safetensors")
    told = {"format": "sparse-24-bitmask" if four else "sparse-bitmask"}
    config = {"x": 1, where: told if where == "sparsity_config" else {"format": "dense", "sparsity_config": told}}
    (source / "config.json").write_text(json.dumps(config))
    held = PackedCheckpoint(source)
    held.verify()
    assert list(held.weights) == ["model.up.weight"] and [n for n, _ in held.dense()] == ["norm"]
    assert held.weights["model.up.weight"].density == 0.5
    unpack(source, tmp_path / "b")
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert set(back) == {"model.up.weight", "norm"} and torch.equal(back["model.up.weight"], weight)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == {"x": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"w.compressed": torch.ones(4, dtype=torch.int8)}, "w.weight: I8 values .* are not read"),
        ({"w.compressed": torch.ones(4).to(torch.float8_e4m3fn)}, "w.weight: F8_E4M3 values"),
        ({"w.bitmask": None}, "its bitmask is missing"),
        ({"w.shape": torch.ones(2)}, "holds no shape"),
        ({"w.shape": torch.tensor([-1, 4])}, "holds no shape"),
        ({"w.shape": torch.tensor([2, 9])}, "bitmask is uint8 of shape"),
        ({"w.weight": torch.ones(2)}, "is there twice"),
        ({"w.compressed": torch.ones(5)}, "the bitmask keeps 4 entries, there are 5 values"),
        ({"w.row_offsets": torch.tensor([0, 1])}, "row_offsets are not those"),
    ],
    ids=str,
)
def test_odd_legacy_files_are_refused(tmp_path, change, says):
    path = tmp_path / "m.safetensors"
    tensors = legacy(torch.eye(2, 8) + torch.eye(2, 8).flip(1), "w") | change
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    said = refused(says, lambda: PackedCheckpoint(path).packed("w.weight"))
    assert said.startswith(str(path))


def test_a_config_of_another_format_is_named(tmp_path):
    save_file({"a.weight_packed": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"format": "pack-quantized"}}')
    refused("its config names the format pack-quantized", PackedCheckpoint, tmp_path)
