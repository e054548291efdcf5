"""`zimage plan`: a table or JSON, for models that are there and for the released ones that are not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from zimage import ZImagePipeline, cli
from zimage.memory.plan import Budget
from zimage.memory.planner import make_plan
from zimage.memory.sizes import RELEASED, Work
from zimage.testing import build_controlnet
from zimage.testing.configs import SIZES, controlnet_config
from zimage.testing.weights import tensor_shapes


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_a_released_model_on_a_card_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--model", "turbo", "--memory", "12GB", "--host-memory", "32GB", "--size", "1280x720")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "turbo, 1280x720, bfloat16: text encoder streamed, 23 of 32 blocks resident, decode whole"
    assert lines[1] == "may be used: 10.06 GiB of the device, 26.82 GiB of the host"
    assert lines[2] == "streamed through 2 places on the device, from memory"
    assert [line.split()[0] for line in lines[3:7]] == ["stage", "prompt", "denoising", "decoding"]
    assert [line.split(":")[0] for line in lines[7:]] == ["not", "not"]


def test_an_image_is_a_stage_that_needs_less_than_the_decode(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--memory", "4GB", "--host-memory", "32GB", "--tokens", 128, "--json")
    _, plain, _ = run(capsys, *options)
    _, out, _ = run(capsys, *options, "--image")
    need = {stage["name"]: stage["device"] for stage in json.loads(out)["stages"]}
    assert list(need) == ["prompt", "image", "denoising", "decoding"]
    assert need["image"] < need.pop("decoding")
    assert json.loads(plain)["placement"] == json.loads(out)["placement"]


def test_a_second_pass_is_planned_for_its_size_and_encodes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--memory", "16GB", "--host-memory", "32GB", "--json")
    _, out, _ = run(capsys, *options, "--size", "768x512", "--hires", 1.5)
    _, expected, _ = run(capsys, *options, "--size", "1152x768", "--image")
    assert out == expected
    code, _, err = run(capsys, "--hires", 5)
    assert code == 2
    assert "hires: its scale must be a number from 1 to 4" in err


def test_a_controlnet_is_counted_as_loading_it_does(
    capsys: pytest.CaptureFixture[str], turbo: str, tmp_path: Path
) -> None:
    net = build_controlnet(tmp_path / "net")
    options = ("--model", turbo, "--device", "cpu", "--dtype", "float32")
    code, out, _ = run(capsys, *options, "--controlnet", net, "--json")
    assert code == 0
    pipe = ZImagePipeline.from_pretrained(turbo, device="cpu", dtype="float32", controlnet=net)
    assert pipe.plan is not None
    assert pipe.controlnet is not None
    planned = json.loads(out)
    assert planned["controlnet"] == {"bytes": pipe.controlnet.bytes, "blocks": 4}
    need = {stage["name"]: stage["device"] for stage in planned["stages"]}
    assert need.pop("image") > pipe.controlnet.bytes  # the control image
    assert need == {stage.name: stage.device for stage in pipe.plan.stages}
    _, out, _ = run(capsys, *options, "--controlnet", net)
    assert "\nof it for the ControlNet: 0.00 GiB, 4 blocks\n" in out


def test_a_controlnet_for_the_released_models_is_known_by_its_header(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of 6 GiB; behind the header is nothing but a hole."""
    shapes = tensor_shapes("controlnet", controlnet_config(SIZES["real"], "2.1"))
    header, end, count = {}, 0, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * math.prod(shape)]}
        end, count = end + 2 * math.prod(shape), count + math.prod(shape)
    content = json.dumps(header).encode()
    with (tmp_path / "net.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    options = ("--memory", "16GB", "--host-memory", "32GB")
    code, out, _ = run(capsys, *options, "--controlnet", tmp_path / "net.safetensors", "--json")
    assert code == 0
    sizes = replace(RELEASED, adapters=2 * count, control_blocks=17)
    plan = make_plan(sizes, Work(from_image=True, together=0), Budget.of_card(16 * 10**9, 32 * 10**9, "16GB"))
    controlnet = {"bytes": 2 * count, "blocks": 17}
    assert 6 * 10**9 < 2 * count < 7 * 10**9
    assert json.loads(out) == {"model": "turbo", "controlnet": controlnet, **json.loads(json.dumps(plan.to_dict()))}
    _, out, _ = run(capsys, *options, "--controlnet", tmp_path / "net.safetensors")
    _, plain, _ = run(capsys, *options)
    assert "text encoder streamed, transformer resident" in plain.splitlines()[0]
    assert "text encoder streamed, 14 of 32 blocks resident" in out.splitlines()[0]


def test_json_is_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--memory", "8GB", "--host-memory", "10GB", "--tokens", 100, "--dtype", "float16", "--json")
    code, out, _ = run(capsys, "--model", "base", *options)
    budget = Budget.of_card(8 * 10**9, int(10e9), "8GB")
    plan = make_plan(RELEASED, Work(tokens=100, dtype="float16", together=0), budget)
    assert code == 0
    assert json.loads(out) == {"model": "base", **json.loads(json.dumps(plan.to_dict()))}


def test_activations_are_named_and_take_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--memory", "12GB", "--host-memory", "32GB", "--weight-dtype", "int8")
    _, weights, _ = run(capsys, *options)
    code, out, _ = run(capsys, *options, "--quantize-activations")
    assert code == 0
    assert "weights and the transformer's activations in int8\n" in out
    assert out.replace("weights and the transformer's activations", "weights") == weights


def test_sources_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--memory", "8GB", "--host-memory", "16GB")
    assert "from files (text encoder) and memory (blocks)" in out
    _, out, _ = run(capsys, "--memory", "17GiB", "--device", "cpu", "--size", 256)
    assert "streamed through 2 places on the device, from files\n" in out


def test_a_checkpoint_and_what_is_free_here(capsys: pytest.CaptureFixture[str], turbo: str) -> None:
    code, out, _ = run(capsys, "--model", turbo, "--device", "cpu", "--size", 256)
    assert code == 0
    assert "256x256, bfloat16: text encoder resident, transformer resident, decode whole" in out
    code, out, _ = run(capsys, "--model", "demo")
    assert out.startswith("demo, 128x128, ")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--memory", "2GB", "--host-memory", "8GB"], 1, "does not fit, nor does a smaller picture"),
        (["--memory", "lots"], 2, "memory must be 'auto' or an amount like '16GB' or '12GiB', got 'lots'"),
        (["--memory", "8GB", "--host-memory", "x"], 2, "zimage: --host-memory must be 'auto' or an amount"),
        (
            ["--quantize-activations"],
            2,
            "--quantize-activations needs --weight-dtype int8 or --weight-dtype float8, it",
        ),
        (["--size", "1000"], 2, "must be a multiple of 16, got 1000; try 992 or 1008"),
        (["--tokens", "0"], 2, "--tokens must be 1 to 1504, got 0"),
        (["--dtype", "int8"], 2, "--dtype must be auto, float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], 2, "--device must be cuda, mps or cpu, got 'tpu'"),
        (["--memory", "8GB", "--encoding", "gpu"], 2, "zimage: --encoding must be resident, streamed, cpu, got 'gpu'"),
        (["--model", "no/where"], 1, "no/where"),
        (["--controlnet", "nothing.safetensors"], 1, "cannot find the ControlNet 'nothing.safetensors'"),
        (["--controlnet", "no/where"], 1, "no/where"),
    ],
)
def test_what_cannot_work_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    came, out, err = run(capsys, *arguments)
    assert (came, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_named_amount_needs_no_torch(run_python: Callable[..., str]) -> None:
    code = """
import sys
from zimage import cli
try:
    cli.main(["plan", "--memory", "16GB", "--host-memory", "32GB"])
except SystemExit:
    assert "torch" not in sys.modules
"""
    assert run_python(code).startswith("turbo, 1024x1024")
