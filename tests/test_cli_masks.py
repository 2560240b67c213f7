"""`maskwright mask`: info, diff, and, or, minus and verify, on small files."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from maskwright.cli.masks import app
from maskwright.core.errors import BadInput
from maskwright.core.mask import Mask, SoftMask
from maskwright.core.maskset import MaskSet, SoftMaskSet
from maskwright.core.pattern import NM, Block, Unstructured
from maskwright.core.store import save

MADE = {"method": "wanda", "version": "0", "settings": {"density": 0.5}, "seed": 7}
P, Q = "model.layers.0.p.weight", "model.layers.0.q.weight"


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def good(*args):
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(match, *args):
    result = run(*args)
    assert isinstance(result.exception, BadInput), (result.output, result.exception)
    text = str(result.exception)
    assert match in text and "\n" not in text, text
    return text


def two_four():
    return torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.bool)


def masks(path, **sites):
    MaskSet(sites or {P: Mask(two_four(), NM(2, 4)), Q: Mask(two_four().flip(1), NM(2, 4))}, MADE, "ab12").save(path)
    return path


@pytest.fixture
def file(tmp_path):
    return masks(tmp_path / "masks.safetensors")


def weights(names=(P, Q), dtype=torch.float32):
    keep = two_four()
    values = [torch.full(keep.shape, 2.0) * keep, torch.full(keep.shape, -2.0) * keep.flip(1)]  # 0 * -2 is -0.0
    return {n: v.to(dtype) for n, v in zip(names, values, strict=True)}


def checkpoint(path, tensors):
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    return path


def test_info_tells_counts_and_making(file):
    told = json.loads(good("info", file, "--json", "--sites"))
    assert (told["sites"], told["kept"], told["total"], told["density"]) == (2, 16, 32, 0.5)
    assert told["patterns"] == ["2:4"] and told["made_by"] == MADE and told["base"] == "ab12"
    assert told["by_site"][0] == {"name": P, "shape": [2, 8], "pattern": "2:4", "kept": 8, "total": 16, "density": 0.5}
    text = good("info", file)
    for part in ("16 of 32", "wanda", '{"density": 0.5}', "seed:      7", "ab12"):
        assert part in text
    assert P not in text and P in good("info", file, "--sites") and "\x1b" not in text


def test_info_of_soft_masks_and_of_no_mask_file(tmp_path):
    save(SoftMaskSet({"a": SoftMask(torch.tensor([0.0, 0.5, 2.0]))}), tmp_path / "soft")
    told = json.loads(good("info", tmp_path / "soft", "--json"))
    assert (told["kind"], told["kept"], told["total"]) == ("soft", 2, 3)
    (tmp_path / "junk").write_bytes(b"junk")
    refused("junk", "info", tmp_path / "junk")
    refused("nothing", "info", tmp_path / "nothing")


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    file = masks(tmp_path / "m", **{"a\x1b[31m\nb": Mask(torch.ones(2, 2, dtype=torch.bool))})
    text = good("info", file, "--sites")
    assert "\x1b" not in text and text.count("\n") == len(text.splitlines())


def test_diff_counts_every_site(file, tmp_path):
    other = two_four()
    other[0, 0], other[1, 0] = False, True
    b = masks(tmp_path / "b", **{P: Mask(other, Unstructured()), "extra": Mask(other)})
    told = json.loads(good("diff", file, b, "--json"))
    assert told["by_site"] == [
        {
            "name": P,
            "both": 7,
            "only_a": 1,
            "only_b": 1,
            "overlap": 7 / 9,
            "patterns": ["2:4", "unstructured"],
            "equal": False,
        }
    ]
    assert told["overlap"] == 7 / 9 and not told["equal"]
    assert told["sites_only_a"] == [Q] and told["sites_only_b"] == ["extra"]
    assert "only in A: " + Q in good("diff", file, b)
    assert run("diff", file, b, "--exit-code").exit_code == 4


def test_diff_of_equal_sets_in_another_order(file, tmp_path):
    sites = MaskSet.load(file)
    b = masks(tmp_path / "b", **{n: sites[n] for n in reversed(list(sites))})
    assert "equal" in good("diff", file, b, "--exit-code")
    assert json.loads(good("diff", file, b, "--json"))["overlap"] == 1.0


def test_diff_without_a_common_site_and_with_other_shapes(file, tmp_path):
    b = masks(tmp_path / "b", x=Mask(torch.ones(2, 2, dtype=torch.bool)))
    assert json.loads(good("diff", file, b, "--json"))["overlap"] is None
    c = masks(tmp_path / "c", **{P: Mask(torch.ones(2, 4, dtype=torch.bool))})
    assert P in refused("(2, 4)", "diff", file, c)


@pytest.mark.parametrize("word", ["and", "or", "minus"])
def test_set_algebra(word, file, tmp_path):
    left, right = two_four(), two_four().roll(1, 1)
    a, b, out = masks(tmp_path / "a", w=Mask(left)), masks(tmp_path / "b", w=Mask(right)), tmp_path / "c"
    good(word, a, b, "--out", out)
    made = MaskSet.load(out)
    assert torch.equal(made["w"].keep, {"and": left & right, "or": left | right, "minus": left & ~right}[word])
    assert made.made_by == {"method": word, "of": [MADE, MADE]}
    before = out.read_bytes()
    refused("--replace", word, a, a, "--out", out)
    assert out.read_bytes() == before
    good(word, a, a, "--out", out, "--replace")
    assert out.read_bytes() != before and {p.name for p in tmp_path.iterdir()} == {"a", "b", "c", file.name}


def test_set_algebra_inner_and_refusals(file, tmp_path):
    b, out = masks(tmp_path / "b", **{P: Mask(two_four(), NM(2, 4))}), tmp_path / "c"
    assert Q in refused("different sites", "and", file, b, "--out", out)
    good("and", file, b, "--out", out, "--inner")
    assert list(MaskSet.load(out)) == [P]
    refused("No such file", "and", b, b, "--out", tmp_path / "no" / "c")
    refused("is a folder", "and", b, b, "--out", tmp_path, "--replace")
    other = masks(tmp_path / "x", x=Mask(two_four()))
    refused("no site in common", "and", b, other, "--out", tmp_path / "d", "--inner")
    ragged = masks(tmp_path / "y", **{P: Mask(torch.ones(2, 4, dtype=torch.bool))})
    assert P in refused("(2, 4)", "and", b, ragged, "--out", tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_verify_holds(file, tmp_path, dtype):
    tensors = weights(dtype=dtype) | {"norm.weight": torch.ones(8)}
    assert "2 sites obey the mask" in good("verify", checkpoint(tmp_path / "w.safetensors", tensors), file)


def test_verify_lets_a_kept_weight_be_zero_and_needs_no_base_hash(file, tmp_path):
    tensors = {n: torch.zeros_like(t) for n, t in weights().items()}
    good("verify", checkpoint(tmp_path / "w.safetensors", tensors), file)


def test_verify_counts_what_came_back(file, tmp_path):
    tensors = weights()
    tensors[P][0, 2:4] = 1e-30
    tensors[P][1, 0] = float("nan")
    result = run("verify", checkpoint(tmp_path / "w.safetensors", tensors), file, "--json")
    told = json.loads(result.output)
    assert result.exit_code == 4 and not told["ok"] and told["sites"] == 2
    assert told["broken"] == [
        {"name": P, "tensor": P, "shape": [2, 8], "pattern": "2:4", "came_back": 3, "groups_over": 2, "weights_over": 3}
    ]
    result = run("verify", tmp_path / "w.safetensors", file)
    assert result.exit_code == 4 and f"{P}: 3 dropped weights are not 0" in result.output
    assert "1 of 2 sites do not obey the mask" in result.output
    assert run("verify", tmp_path / "w.safetensors", file, "--where", "q").exit_code == 0
    MaskSet({}).save(tmp_path / "empty")
    refused("names no sites", "verify", tmp_path / "w.safetensors", tmp_path / "empty")
    refused("matches no weight", "verify", tmp_path / "w.safetensors", file, "--where", "nope")


def test_verify_names_the_first_three_sites(tmp_path):
    keep = torch.zeros(2, 2, dtype=torch.bool)
    file = masks(tmp_path / "m", **{f"s{i}": Mask(keep) for i in range(5)})
    result = run("verify", checkpoint(tmp_path / "w", {f"s{i}": torch.ones(2, 2) for i in range(5)}), file)
    assert result.exit_code == 4 and "s2: 4" in result.output and "s3" not in result.output
    assert "5 of 5 sites" in result.output


def test_verify_another_pattern_with_a_mask(file, tmp_path):
    path = checkpoint(tmp_path / "w.safetensors", weights())
    good("verify", path, file, "--pattern", "4:8")
    result = run("verify", path, file, "--pattern", "1:4", "--json")
    broken = json.loads(result.output)["broken"]
    assert result.exit_code == 4 and [r["came_back"] for r in broken] == [0, 0] and broken[0]["groups_over"] == 4
    refused("not divisible", "verify", path, file, "--pattern", "2:3")
    refused("unknown pattern", "verify", path, file, "--pattern", "zebra")


def test_verify_follows_the_dim_of_the_masks_own_pattern(tmp_path):
    keep = two_four().T.contiguous()
    file = masks(tmp_path / "m", w=Mask(keep, NM(2, 4, 0)))
    path = checkpoint(tmp_path / "w", {"w": keep.float()})
    good("verify", path, file, "--pattern", "2:4")
    refused("not divisible", "verify", path, file, "--pattern", "2:4@1")


def test_verify_blocks_with_and_without_a_mask(tmp_path):
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[:2, 2:] = False
    file = masks(tmp_path / "m", w=Mask(keep, Block((2, 2))))
    value = keep.float()
    value[3, 3] = 0  # a kept weight that is 0
    path = checkpoint(tmp_path / "w", {"w": value})
    good("verify", path, file)
    result = run("verify", path, "--pattern", "block:2x2", "--json")  # no mask to say that this 0 was kept
    assert result.exit_code == 4 and json.loads(result.output)["broken"][0]["weights_over"] == 1
    good("verify", checkpoint(tmp_path / "v", {"w": keep.float()}), "--pattern", "block:2x2")
    value[0, 2] = 1
    told = json.loads(run("verify", checkpoint(tmp_path / "u", {"w": value}), file, "--json").output)["broken"][0]
    assert (told["came_back"], told["groups_over"], told["weights_over"]) == (1, 1, 1)


def test_verify_a_pattern_without_masks(tmp_path):
    tensors = weights() | {"embed.weight": torch.ones(3, 5), "norm.weight": torch.zeros(7)}
    path = checkpoint(tmp_path / "w", tensors)
    text = good("verify", path, "--pattern", "2:4")
    assert "2 sites obey 2:4; not checked, as they hold no 0: 1 other weights" in text
    assert json.loads(good("verify", path, "--pattern", "2:4", "--where", "layers.*.p.*", "--json"))["sites"] == 1
    result = run("verify", path, "--pattern", "1:4")
    assert result.exit_code == 4 and "--where" in result.output
    assert "embed.weight" in refused("--where", "verify", path, "--pattern", "2:4", "--where", "embed")
    refused("matches no weight", "verify", path, "--pattern", "2:4", "--where", "norm")
    refused("needs a mask file", "verify", path)
    refused("asks nothing", "verify", path, "--pattern", "unstructured")
    dense = checkpoint(tmp_path / "d", {"w": torch.ones(4, 4)})
    for where in ([], ["--where", "w"]):
        assert run("verify", dense, "--pattern", "2:4", *where).exit_code == 4


@pytest.mark.parametrize("names", [("layers.0.p.weight", "layers.0.q.weight"), (f"lm.{P}", f"lm.{Q}")])
def test_verify_finds_names_with_another_prefix(file, tmp_path, names):
    path = checkpoint(tmp_path / "w", weights(names))
    assert json.loads(good("verify", path, file, "--json"))["sites"] == 2
    tensors = weights(names)
    tensors[names[1]][:] = 1
    told = json.loads(run("verify", checkpoint(path, tensors), file, "--json").output)["broken"]
    assert [(r["name"], r["tensor"]) for r in told] == [(Q, names[1])]


def test_verify_refuses_missing_and_ambiguous_names(file, tmp_path):
    assert Q in refused("1 of 2 sites", "verify", checkpoint(tmp_path / "w", {P: weights()[P]}), file)
    two = weights((f"a.{P}", Q)) | {f"b.{P}": torch.ones(2, 8)}
    assert f"a.{P}, b.{P}" in refused("could be", "verify", checkpoint(tmp_path / "v", two), file)
    one = checkpoint(tmp_path / "u", {"weight": torch.ones(2, 8)})
    refused("would both be weight", "verify", one, file)
    ragged = weights() | {P: torch.ones(2, 4)}
    assert P in refused("(2, 4)", "verify", checkpoint(tmp_path / "t", ragged), file)


def shards(folder, tensors=None):
    tensors = tensors or weights()
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, part in zip(tensors, files, strict=True):
        checkpoint(folder / part, {name: tensors[name]})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(tensors, files, strict=True))}))
    return index


def test_verify_reads_folders_and_shards(file, tmp_path):
    index = shards(tmp_path)  # masks.safetensors lies beside
    good("verify", tmp_path, file)
    good("verify", index, file)
    shards(tmp_path, weights() | {Q: torch.ones(2, 8)})
    result = run("verify", tmp_path, file)
    assert result.exit_code == 4 and Q in result.output
    checkpoint(tmp_path / "model.safetensors", weights())
    good("verify", tmp_path, file)  # as transformers: the whole file comes first


def test_verify_finds_the_only_checkpoint_of_a_folder(file, tmp_path):
    refused("no .safetensors weights", "verify", tmp_path, file)
    checkpoint(tmp_path / "other.safetensors", weights())
    good("verify", tmp_path, file)
    checkpoint(tmp_path / "third.safetensors", weights())
    refused("which one? other.safetensors, third.safetensors", "verify", tmp_path, file)


def test_verify_refuses_bad_files(file, tmp_path):
    refused("no such file", "verify", tmp_path / "none", file)
    refused("a mask file, not a checkpoint", "verify", file, file)
    path = checkpoint(tmp_path / "w.safetensors", weights())
    path.write_bytes(path.read_bytes()[:-9])
    refused("cannot be read", "verify", path, file)
    path.write_bytes(b"")
    refused("cannot be read", "verify", path, file)
    path.unlink()
    index = shards(tmp_path)
    whole = json.loads(index.read_text())
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "\ud800", "[" * 100_000):
        index.write_bytes(text.encode("utf-8", "surrogatepass"))
        refused("not a shard index", "verify", tmp_path, file)
    for shard, told in (("../x.safetensors", "not the name"), ("gone.safetensors", "missing"), (7, "not the name")):
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], P: shard}}))
        refused(told, "verify", tmp_path, file)
    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "ghost": whole["weight_map"][P]}}))
    refused("lacks ghost", "verify", tmp_path, file)


def test_verify_holds_one_tensor_at_a_time(file, tmp_path, monkeypatch):
    import weakref

    import safetensors

    alive, real = [], safetensors.safe_open

    class Spy:
        def __init__(self, *args, **kwargs):
            self.inner = real(*args, **kwargs)

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def get_tensor(self, key):
            assert not any(ref() is not None for ref in alive)
            value = self.inner.get_tensor(key)
            alive.append(weakref.ref(value))
            return value

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    path = checkpoint(tmp_path / "w", weights())
    good("verify", path, "--pattern", "2:4")
    good("verify", path, file)
    assert len(alive) == 4


def test_the_commands_start_without_torch():
    code = "import sys, maskwright.cli.masks; print({'torch', 'safetensors', 'rich.table'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
