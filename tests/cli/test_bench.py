"""`zimage bench` on tiny random weights: what it prints and keeps, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zimage.bench import sides

QUICK = ("bench", "--device", "cpu", "--dtype", "float32", "--height", 64, "--width", 64, "--steps", 2)
Command = Callable[..., Any]


def test_json_is_one_object_and_all_there_is_on_stdout(zimage: Command) -> None:
    """Where stderr is no terminal nothing is written there but the warning."""
    ended = zimage(*QUICK, "--size", "tiny", "--variant", "base", "--rounds", 2, "--json")
    assert (ended.code, ended.err) == (0, "zimage: medians of 2 rounds are uncertain; the default is 10\n")
    report = json.loads(ended.out)
    assert [stage["name"] for stage in report["stages"]] == ["encode", "denoise", "decode", "end-to-end"]
    for stage in report["stages"]:
        ours, theirs = stage["zimage"], stage["diffusers"]
        assert stage["ratio"] == theirs["median_s"] / ours["median_s"]
        assert ours["evaluations"] == theirs["evaluations"] == {"denoise": 4, "end-to-end": 4}.get(stage["name"], 0)
        assert ours["prompts"] == theirs["prompts"] == {"encode": 2, "end-to-end": 2}.get(stage["name"], 0)
        assert 0.999 <= stage["cosine"] <= 1.000001
        assert 0 < ours["product_share"] < 1.5
        assert len(ours["times_s"]) == report["rounds"] == 2
    assert report["stages"][1]["step_cosine"] >= 0.999
    assert set(report["attention"]) == {"zimage", "diffusers"}
    assert report["limits"]["copy_gbs"] > 0
    assert report["versions"].keys() >= {"zimage", "torch", "diffusers", "transformers"}
    assert report["picture"]["guidance_scale"] == 4.0


def test_a_table_and_a_file(zimage: Command, tmp_path: Path) -> None:
    ended = zimage(*QUICK, "--stages", "decode", "--output", "kept", "--only", "zimage")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith("tiny, turbo: 64x64, 2 steps, float32 on ")
    assert [line.split()[0] for line in lines[2:6]] == ["stage", "decode", "matrix", "copy:"]
    (kept,) = (tmp_path / "kept").iterdir()
    assert ended.err == f"zimage: kept in {kept.relative_to(tmp_path)}\n"
    assert kept.name.startswith("bench-tiny-turbo-64x64-float32-")
    report = json.loads(kept.read_text())
    assert (report["rounds"], len(report["stages"][0]["zimage"]["times_s"])) == (10, 10)


def test_a_checkpoint_in_a_folder(zimage: Command, base: str) -> None:
    ended = zimage(*QUICK, "--model", base, "--rounds", 1, "--stages", "denoise", "--json", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert report["model"] == {
        "name": base,
        "weights": "given",
        "variant": "base",
        "dtype": "float32",
        "blocks": "eager",
        "layers": "full",
    }
    assert report["stages"][0]["cosine"] >= 0.999


def test_rounded_layers_beside_full_ones(zimage: Command) -> None:
    rounded = ("--weight-dtype", "int8", "--quantize-activations")
    ended = zimage(*QUICK, *rounded, "--rounds", 1, "--stages", "denoise", "--json", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    report = json.loads(ended.out)
    assert report["model"]["layers"] == "weights and activations in int8"
    assert 0.99 < report["stages"][0]["cosine"] < 0.9999999
    assert set(report["stages"][0]) >= {"zimage", "diffusers"}


def test_results_that_differ_end_with_1(zimage: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = sides.ZImage.decode
    monkeypatch.setattr(sides.ZImage, "decode", lambda side, latents: decode(side, latents).flip(-1))
    ended = zimage(*QUICK, "--rounds", 1, "--stages", "decode")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("zimage: decode: the results differ: cosine 0.")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--size", "huge"], 2, "size must be one of tiny, small, wide, real, got 'huge'"),
        (["--size", "tiny", "--model", "demo"], 2, "leave the other out"),
        (["--rounds", "0"], 2, "rounds must be 1 or more, got 0"),
        (["--rounds", "9", "--output", "kept"], 2, "a result that is kept needs 10 rounds or more, got 9"),
        (["--stages", "encode,paint"], 2, "stages must be of encode, denoise, decode, end-to-end, got paint"),
        (["--only", "diffusers"], 2, "only can be zimage, got 'diffusers'"),
        (["--variant", "fast"], 2, "variant must be one of base, turbo, got 'fast'"),
        (["--height", "1000"], 2, "height must be a multiple of 16, got 1000; try 992 or 1008"),
        (["--model", "turbo", "--width", "1000"], 2, "width must be a multiple of 16, got 1000"),
        (
            ["--weight-dtype", "bfloat16"],
            2,
            "--weight-dtype can be int8, float8, nf4 here, or left out; got 'bfloat16'",
        ),
        (["--quantize-activations"], 2, "--quantize-activations needs --weight-dtype int8 or --weight-dtype float8"),
        (["--device", "tpu"], 2, "device 'tpu' cannot be used here"),
        (["--dtype", "int8", "--device", "cpu"], 2, "got 'int8'"),
        (["--model", "./nowhere"], 1, "nowhere"),
    ],
)
def test_what_cannot_work_is_one_line(zimage: Command, arguments: list[str], code: int, said: str) -> None:
    ended = zimage("bench", *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1
