"""Which kernel attention runs with: by name, by measuring, what is refused, and what pictures and plans say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor

from zimage import RequestError, ZImagePipeline
from zimage.models import attention
from zimage.models.attention import attend, choose

CPU = torch.device("cpu")


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.randn(3, 1, 40, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that diffusers is asked for, instead of running them; "active" is diffusers' own setting."""
    asked: list[str] = []

    def dispatch(query: Tensor, key: Tensor, value: Tensor, *, backend: Any = None) -> Tensor:
        asked.append("active" if backend is None else AttentionBackendName(backend).value)
        return value

    monkeypatch.setattr(attention, "dispatch_attention_fn", dispatch)
    return asked


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash"])
def test_a_backend_by_name_computes_attention(name: str) -> None:
    assert choose(name, 1, 4, 16, CPU, torch.float32) == name
    expected = attention._exact(tuple(inputs()))
    result = attend(*inputs(), chosen=AttentionBackendName(name)).flatten()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash3", "attention backend must be auto, fastest, float8, .*native.*; got 'flash3'"),
        ("float8", r"attention backend 'float8' does not work on cpu in torch\.float32: .*needs a Hopper card"),
        (None, "attention backend must be auto, fastest, .*; got None"),
        ("_flash_3_hub", "'_flash_3_hub' runs code that it downloads.*install its package"),
        ("flash", r"'flash' does not work on cpu in torch.float32: .*install `flash-attn>=\S+`; leave it out"),
        ("sage", r"attention backend 'sage' does not work on cpu in torch.float32: .*install `sageattention>="),
        ("_native_cudnn", "attention backend '_native_cudnn' does not work on cpu"),
    ],
)
def test_what_is_refused(name: str, message: str, base: ZImagePipeline) -> None:
    with pytest.raises(RequestError, match=message):
        base.set_attention_backend(name)
    assert base.attention_backend == "native"


def test_a_backend_with_wrong_results_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "dispatch_attention_fn", lambda query, key, value, backend: value)
    with pytest.raises(
        RequestError, match=r"'_native_flash' does not work on cpu in torch\.float32: its result is wrong"
    ):
        choose("_native_flash", 1, 4, 16, CPU, torch.float32)


def test_the_fastest_is_measured_among_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    times = {"native": 1.0, "_native_flash": 0.9, "flash": 0.5}

    def median(work: Any, device: torch.device) -> float:
        tried.append(name := work.keywords["backend"].value)
        if name not in times:
            raise RuntimeError("not installed")
        return times[name]

    monkeypatch.setattr(attention, "_median", median)
    assert choose("fastest", 64, 4, 16, CPU, torch.float32) == "flash"
    assert tuple(tried) == attention.EXACT
    times |= {"_native_flash": 0.99, "flash": 0.985}
    assert choose("fastest", 64, 4, 16, CPU, torch.float32) == "native"


def test_the_fastest_really_runs(own_turbo: ZImagePipeline) -> None:
    own_turbo.set_attention_backend("fastest")
    assert own_turbo.attention_backend in attention.EXACT


def test_the_processors_backend_and_diffusers_own_setting_count(seen: list[str]) -> None:
    attend(*inputs())
    attend(*inputs(), backend=AttentionBackendName._NATIVE_MATH)
    attend(*inputs(), backend="_native_math", chosen=AttentionBackendName._NATIVE_FLASH)
    assert seen == ["active", "_native_math", "_native_flash"]


def test_flash_attention_3_is_taken_where_it_is(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card, automatic = torch.device("cuda", 0), attention._automatic
    assert automatic(card, torch.bfloat16) is AttentionBackendName._FLASH_3
    assert automatic(card, torch.float32) is None
    assert automatic(CPU, torch.bfloat16) is None
    capability = (8, 9)
    assert automatic(card, torch.bfloat16) is None
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False)
    capability = (9, 0)
    assert automatic(card, torch.bfloat16) is None


@pytest.mark.parametrize(("chosen", "expected"), [("_flash_3", "native"), ("_native_math", "_native_math")])
def test_float32_goes_to_torch(seen: list[str], chosen: str, expected: str) -> None:
    """What an overflow brings about in a half-precision picture."""
    attend(*inputs(torch.float32), chosen=AttentionBackendName(chosen))
    attend(*inputs(torch.bfloat16), chosen=AttentionBackendName(chosen))
    assert seen == [expected, chosen]


def test_plan_and_recipe_name_it(own_turbo: ZImagePipeline, small: dict[str, Any]) -> None:
    assert own_turbo.plan is not None
    assert (own_turbo.plan.attention, own_turbo.attention_backend) == ("native", "native")
    before = own_turbo("a fox", seed=1, **small).images[0]
    own_turbo.set_attention_backend("_native_math")
    assert "attention: _native_math" in str(own_turbo.plan).splitlines()[-1]
    replay = own_turbo.replay(before.recipe)
    assert "attention was native, here it is _native_math" in replay.differences
    assert own_turbo("a fox", seed=1, **small).images[0].recipe.runtime["attention"] == "_native_math"
    own_turbo.set_attention_backend("auto")
    assert own_turbo.replay(before.recipe).same_bits
    assert own_turbo.plan.attention == "native"


def test_it_is_chosen_as_a_model_is_loaded(turbo_folder: Path) -> None:
    assert ZImagePipeline.from_pretrained(turbo_folder, attention_backend="_native_math").attention_backend == (
        "_native_math"
    )
    with pytest.raises(RequestError, match="got 'flash3'"):  # before anything is looked for
        ZImagePipeline.from_pretrained("nowhere/to-be-found", attention_backend="flash3")


def test_a_choice_stays_with_its_pipeline(turbo_folder: Path) -> None:
    theirs = diffusers.ZImagePipeline.from_pretrained(turbo_folder)
    one, other = ZImagePipeline.from_diffusers(theirs), ZImagePipeline.from_diffusers(theirs)
    other.set_attention_backend("_native_math")
    assert one.attention_backend == "native"
    with attention_backend("_native_flash"):
        assert one.attention_backend == "_native_flash"
        assert other.attention_backend == "_native_math"
    other.transformer.attend = lambda query, key, value, backend: value
    assert other.attention_backend == "own"
