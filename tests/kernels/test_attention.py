"""Attention in float8: near that of the rounded numbers, whatever their reach, and who gets it in a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage import RequestError, ZImagePipeline
from zimage.kernels import attention, fused
from zimage.kernels.switch import using
from zimage.models.attention import FLOAT8, apart, attend, attend_in_float8, choose, row_kind_of
from zimage.models.precision import Float32Math
from zimage.models.rowwise import Quantized
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES

FLOAT8_TYPE = torch.float8_e4m3fn
SHAPES = [(2, 150, 2, 32), (1, 17, 3, 64), (1, 256, 1, 128), (2, 129, 2, 128)]
"""Tokens that make less than a block of keys, whole blocks, and those and some more."""
STEP = 2**-4
"""How far float8 e4m3 may be off, relative to a number."""
EPS = 1e-5

Noise = Callable[..., Tensor]


def rounded(wide: Tensor) -> Quantized:
    scale = (wide.float().abs().amax() / 448).view(1)
    return Quantized((wide / scale).to(FLOAT8_TYPE), scale, wide.dtype)


def inputs(noise: Noise, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Quantized, Quantized, Tensor]:
    query, key, value = (noise(*shape, dtype=dtype) for _ in range(3))
    return rounded(query * 2), rounded(key), value


def mixed(query: Quantized, key: Quantized, value: Tensor) -> Tensor:
    result = attention.attend(query.values, query.scale, key.values, key.scale, value)
    assert result is not None
    assert (result.shape, result.dtype) == (value.shape, value.dtype)
    return result


def exact(query: Quantized, key: Quantized, value: Tensor) -> Tensor:
    """Of the rounded queries and keys, in float64."""
    wide = ((one.values.double() * one.scale).transpose(1, 2) for one in (query, key))
    return torch.nn.functional.scaled_dot_product_attention(*wide, value.double().transpose(1, 2)).transpose(1, 2)


def distance(result: Tensor, wanted: Tensor) -> float:
    return ((result - wanted).norm() / wanted.norm()).item()


def assert_mixed(given: tuple[Quantized, Quantized, Tensor]) -> None:
    """Values and weights are rounded, so that of noise around zero as much is off as of each: a third of `STEP`."""
    result, wanted = mixed(*given).double(), exact(*given)
    assert distance(result, wanted) <= 0.7 * STEP
    ones = torch.ones_like(given[2])  # of which each is as large as the largest: weights alone are rounded
    torch.testing.assert_close(mixed(*given[:2], ones), ones, rtol=0, atol=STEP / 2)


@pytest.mark.no_cover  # lines are counted in the others
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_is_attention(noise: Noise, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_mixed(inputs(noise, *shape, dtype=dtype))


@pytest.mark.parametrize("scale", [2.0**-100, 1e-12])
def test_keys_that_all_weigh_the_same(noise: Noise, scale: float) -> None:
    """Of norms whose weights are zero or nearly so; what fills the last block up weighs nothing."""
    query, key, value = inputs(noise, 1, 160, 2, 32)
    small = torch.full((1,), scale, device=value.device)
    given = Quantized(query.values, small, query.dtype), Quantized(key.values, small, key.dtype), value
    assert_mixed(given)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_one_key_far_above_the_others(noise: Noise, first: bool) -> None:
    """In the first block, which all after it add nothing to, and in the last, beside which none before it counts."""
    query, key, value = inputs(noise, 1, 300, 1, 64)
    wide = key.widened()
    wide[:, 0 if first else -1] = query.widened().mean(1) * 400
    given = rounded(query.widened() + 1), rounded(wide + 1), value
    assert_mixed(given)


def test_each_channel_of_values_has_a_scale(noise: Noise) -> None:
    query, key, value = inputs(noise, 1, 200, 2, 32)
    value[..., 0] *= 2.0**20
    value[..., 1] *= 2.0**-20
    value[..., 2] = 0
    result, wanted = mixed(query, key, value).double(), exact(query, key, value)
    for channel in range(32):
        reached = (result - wanted)[..., channel].norm()
        assert reached <= 0.7 * STEP * wanted[..., channel].norm()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the same
def test_a_picture_is_not_changed_by_others_in_its_batch(noise: Noise) -> None:
    query, key, value = inputs(noise, 3, 150, 2, 32)
    value[2] = torch.inf
    result = mixed(query, key, value)
    for number in range(2):
        one = slice(number, number + 1)
        parts = (Quantized(whole.values[one], whole.scale, whole.dtype) for whole in (query, key))
        assert torch.equal(mixed(*parts, value[one]), result[one])
    assert not result[2].isfinite().any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN, of the interpreter
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(noise: Noise, broken: float) -> None:
    query, key, value = inputs(noise, 1, 150, 2, 32)
    value[0, 140, 1, 5] = broken
    result = mixed(query, key, value)
    assert not result[0, :, 1, 5].isfinite().any()
    assert result[0, :, 0].isfinite().all()
    values = query.values.clone()
    values.view(torch.uint8)[0, 7, 0, 3] = 0x7F  # NaN
    result = mixed(Quantized(values, query.scale, query.dtype), key, noise(1, 150, 2, 32, dtype=torch.bfloat16))
    assert result[0, 7, 0].isnan().all()
    assert result[0, 8].isfinite().all()


def test_what_no_kernel_was_written_for(noise: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = inputs(noise, 1, 20, 2, 32)

    def refused(**other: Tensor) -> bool:
        given = {"query": query.values, "query_scale": query.scale, "key": key.values, "key_scale": key.scale}
        return attention.attend(**(given | {"value": value} | other)) is None

    assert not refused()
    assert refused(value=value.float())
    assert refused(query=query.widened())
    assert refused(key=key.values[:, :10])
    assert refused(value=value.transpose(1, 2).contiguous().transpose(1, 2))
    few = {name: one[..., :16].contiguous() for name, one in (("query", query.values), ("key", key.values))}
    assert refused(**few, value=value[..., :16].contiguous())
    monkeypatch.setattr(attention, "TensorDescriptor", None)
    assert refused()


@pytest.mark.parametrize(("tokens", "heads", "size"), [(70, 4, 16), (9, 3, 32), (3, 30, 128)])
def test_queries_and_keys_are_rounded_where_they_are_turned(noise: Noise, tokens: int, heads: int, size: int) -> None:
    """The numbers that are turned anyway, divided by what none of them can pass and rounded to the nearest."""
    query, key = (noise(2, tokens, heads, size, dtype=torch.bfloat16) for _ in range(2))
    query[0, 1, 0], key[1, 2, 1, 3] = 0, torch.nan
    query[0, 2, 1] = torch.nn.functional.one_hot(torch.tensor(3), size)  # all of its norm in one channel
    weights = noise(size, dtype=torch.bfloat16), noise(size, dtype=torch.bfloat16)
    angles = noise(1, tokens, size // 2)
    given = query, key, *weights, torch.polar(torch.ones_like(angles), angles), EPS, EPS
    plain, narrow = fused.rotate_normalized(*given), fused.rotate_normalized(*given, False, FLOAT8_TYPE)
    assert plain is not None
    assert narrow is not None
    for one, (values, scale, dtype), weight in zip(plain, narrow, weights, strict=True):
        assert (values.dtype, scale.shape, dtype) == (FLOAT8_TYPE, (1,), torch.bfloat16)
        torch.testing.assert_close(scale, weight.float().abs().amax().view(1) * size**0.5 / 448)
        widened = values.float() * scale
        assert torch.equal(widened.isnan(), one.isnan())
        least = scale.item() * 2**-6  # below which numbers lie as far apart as there
        torch.testing.assert_close(widened, one.float(), rtol=STEP * 1.1, atol=STEP * least, equal_nan=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four blocks, with heads of 32 channels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", replace(SIZES["tiny"], n_heads=2, axes_dims=(8, 12, 12), n_refiner_layers=1))
        return build_checkpoint(tmp_path_factory.mktemp("checkpoints") / "turbo")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each attention in float8 that was asked for was computed so."""
    seen: list[bool] = []
    own = attention.attend

    def attend(*args: Any) -> Tensor | None:
        result = own(*args)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(attention, "attend", attend)
    return seen


def drawn(pipe: ZImagePipeline) -> Tensor:
    options: dict[str, Any] = {"num_inference_steps": 1, "seed": 1, "any_size": True, "progress": False}
    images = pipe("a fox", height=64, width=64, output_type="latent", **options).images
    return images[0].float()  # type: ignore[union-attr]


def test_a_pipeline_computes_with_it(folder: Path, device: torch.device, asked: list[bool]) -> None:
    with using("on"):
        pipe = ZImagePipeline.from_pretrained(folder, dtype="bfloat16", device=device)
        expected = drawn(pipe)
        assert not asked
        pipe.set_attention_backend("float8")
        assert asked == [True]  # the trial
        assert pipe.attention_backend == "float8"
        assert "attention: float8" in str(pipe.plan)
        result = drawn(pipe)
    assert asked == [True] * 5  # once in each block
    assert 0 < distance(result, expected) <= 0.1
    with using("off"):
        assert distance(drawn(pipe), expected) <= 0.02  # as it is elsewhere: exact
    pipe.set_attention_backend("auto")
    with using("on"):
        assert torch.equal(drawn(pipe), expected)


def test_what_is_said_of_it_is_what_is_computed(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with using("on"):
        pipe = ZImagePipeline.from_pretrained(folder, dtype="bfloat16", device=device, attention_backend="float8")
        assert pipe.attention_backend == "float8"
        with using("off"):
            assert pipe.attention_backend == "native"
        with monkeypatch.context() as patch:
            patch.setattr(attention, "takes", lambda value: False)  # as on another card
            assert pipe.attention_backend == "native"
        assert pipe.to(torch.float32).attention_backend == "native"


def test_gradients_and_heads_of_other_sizes_are_not_rounded(
    folder: Path, turbo_folder: Path, device: torch.device, asked: list[bool]
) -> None:
    """Neither are their queries and keys, which no kernel would take then."""
    with using("on"):
        pipe = ZImagePipeline.from_pretrained(folder, dtype="bfloat16", device=device)
        for block in (*pipe.transformer.noise_refiner, *pipe.transformer.context_refiner, *pipe.transformer.layers):
            block.attention.to_v.register_forward_hook(lambda module, inputs, output: output.mT.contiguous().mT)
        expected = drawn(pipe)
        pipe.set_attention_backend("float8")
        asked.clear()
        assert torch.equal(drawn(pipe), expected)
        small = ZImagePipeline.from_pretrained(turbo_folder, dtype="bfloat16", device=device)
        expected = drawn(small)
        small.transformer.attend = attend_in_float8
        assert torch.equal(drawn(small), expected)
        value = torch.zeros(1, 20, 2, 32, dtype=torch.bfloat16, device=device)
        assert row_kind_of(attend_in_float8, value) == "float8"
        with torch.enable_grad():
            assert row_kind_of(attend_in_float8, value.requires_grad_()) is None
    assert not asked


def test_sequences_one_after_the_other(noise: Noise) -> None:
    query, key, value = inputs(noise, 1, 52, 2, 32)
    together = apart(attend_in_float8, [20, 32])
    with using("on"):
        assert row_kind_of(together, value) == row_kind_of(apart(attend_in_float8, [52]), value) == "float8"
        assert row_kind_of(apart(attend, [20, 32]), value) is None
        result = together(query, key, value, backend=None)
    for begin, end in ((0, 20), (20, 52)):
        part = [Quantized(one.values[:, begin:end], one.scale, one.dtype) for one in (query, key)]
        with using("on"):
            alone = attend_in_float8(*part, value[:, begin:end])
        assert torch.equal(result[:, begin:end], alone)
        assert 0 < distance(alone.double(), exact(part[0], part[1], value[:, begin:end])) <= 0.1


def test_float32_needs_none(folder: Path, device: torch.device, asked: list[bool]) -> None:
    """Which an overflow in the middle of a picture brings about."""
    with using("on"):
        pipe = ZImagePipeline.from_pretrained(folder, dtype="bfloat16", device=device)
        with Float32Math():
            expected = drawn(pipe)
        pipe.set_attention_backend("float8")
        asked.clear()
        with Float32Math():
            assert torch.equal(drawn(pipe), expected)
    assert not asked


def test_where_it_cannot_be_had(device: torch.device) -> None:
    sizes = 20, 2, 32, device
    with using("on"):
        assert choose(FLOAT8, *sizes, torch.bfloat16) == FLOAT8
        with pytest.raises(RequestError, match=r"'float8' does not work on \S+ in torch\.float32: .*a Hopper card"):
            choose(FLOAT8, *sizes, torch.float32)
    with using("off"), pytest.raises(RequestError, match=r"a Hopper card .*and zimage's kernels"):
        choose(FLOAT8, *sizes, torch.bfloat16)


def test_rows_that_no_kernel_takes_are_widened(noise: Noise) -> None:
    query, key, value = inputs(noise, 1, 20, 2, 32)
    with using("off"):
        result = attend_in_float8(query, key, value)
    assert distance(result.double(), exact(query, key, value)) <= 0.01
