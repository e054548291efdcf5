"""Precision: the type chosen for a device, float32 arithmetic over half-precision weights, and the retry with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zimage import NonFiniteError, RequestError
from zimage.models import precision
from zimage.models.precision import Float32Math, choose_dtype, finite, is_finite, overflow_scale, residual_dtype

CPU, CUDA, MPS, XPU = (torch.device(name) for name in ("cpu", "cuda", "mps", "xpu"))
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", CUDA) == dtype


@pytest.mark.parametrize(
    ("instructions", "dtype"),
    [
        ((), torch.float32),
        (("_is_avx512_bf16_supported",), torch.bfloat16),
        (("_is_amx_tile_supported",), torch.bfloat16),
    ],
    ids=str,
)
def test_cpu(monkeypatch: pytest.MonkeyPatch, instructions: tuple[str, ...], dtype: torch.dtype) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe in instructions, raising=False)
    assert choose_dtype("auto", CPU) == dtype


def test_cpu_of_a_torch_without_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert choose_dtype("auto", CPU) == torch.float32


def test_other_devices() -> None:
    assert choose_dtype("auto", MPS) == torch.float16
    assert choose_dtype("auto", XPU) == torch.float32


@pytest.mark.parametrize("name", precision.DTYPES)
def test_a_dtype_that_was_asked_for(name: str) -> None:
    dtype = getattr(torch, name)
    for device in (CPU, CUDA, MPS):
        assert choose_dtype(name, device) == choose_dtype(dtype, device) == dtype


@pytest.mark.parametrize("dtype", ["fp16", "half", "int8", "", torch.float64, torch.int8, None, 16])
def test_no_dtype(dtype: Any) -> None:
    with pytest.raises(RequestError, match="dtype must be 'auto', 'float32', 'bfloat16', 'float16' or their torch"):
        choose_dtype(dtype, CPU)


def test_float16_gets_a_wide_residual_and_a_power_of_two() -> None:
    assert [residual_dtype(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32, torch.bfloat16, torch.float32,
    ]  # fmt: skip
    assert overflow_scale(torch.float32) == overflow_scale(torch.bfloat16) == 1.0
    assert math.frexp(overflow_scale(torch.float16))[0] == 0.5
    assert overflow_scale(torch.float16) * 1e7 < torch.finfo(torch.float16).max


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.matmul(a, b),
        lambda a, b: a * b + 1,
        lambda a, b: 2 * a,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.stack((a, b)).sum(),
        lambda a, b: torch.nn.functional.linear(a, weight=b),
        lambda a, b: torch.nn.functional.silu(a),
        lambda a, b: nn.functional.scaled_dot_product_attention(a[None], b[None], b[None]),
        lambda a, b: a.mean(dim=-1, keepdim=True),
        lambda a, b: torch.where(a > 0, a, b),
    ],
)
def test_operations_are_those_of_float32(dtype: torch.dtype, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 8, generator=generator).to(dtype) for _ in range(2))
    with Float32Math():
        result = operation(a, b)
    assert result.dtype == torch.float32
    assert torch.equal(result, operation(a.float(), b.float()))
    assert a.dtype == b.dtype == dtype


def test_what_float16_cannot_hold_is_held() -> None:
    large = torch.full((2, 2), 60000.0, dtype=torch.float16)
    assert not is_finite(large @ large)
    with Float32Math():
        assert (large @ large)[0, 0].item() == 2 * 60000.0**2


@pytest.mark.parametrize(
    "cast",
    [
        lambda tensor: tensor.half(),
        lambda tensor: tensor.bfloat16(),
        lambda tensor: tensor.to(torch.float16),
        lambda tensor: tensor.to("cpu", torch.bfloat16),
        lambda tensor: tensor.to(dtype=torch.float16),
        lambda tensor: tensor.to(torch.empty(0, dtype=torch.float16)),
        lambda tensor: tensor.type_as(torch.empty(0, dtype=torch.bfloat16)),
    ],
)
def test_casts_to_half_precision_are_skipped(cast: Callable[[Tensor], Tensor]) -> None:
    exact = torch.tensor([1.0001, 1e30])
    with Float32Math():
        assert torch.equal(cast(exact), exact)


def test_what_a_skipped_cast_gives_may_be_written_to() -> None:
    """As long as the cast would have made a tensor of its own."""
    exact, half = torch.ones(2), torch.ones(2, dtype=torch.float16)
    with Float32Math():
        exact.bfloat16().mul_(2.0)
        exact.to(torch.float16).add_(1.0)
        assert torch.equal(exact, torch.ones(2))
        half.to(torch.float16).mul_(2.0)
    assert torch.equal(half, torch.ones(2, dtype=torch.float16))


def test_other_types_are_left_alone() -> None:
    whole, double = torch.tensor([1, 2]), torch.tensor([1.0], dtype=torch.float64)
    with Float32Math():
        assert (whole + whole).dtype == torch.int64
        assert (double * 2).dtype == whole.double().dtype == torch.float64
        assert whole.to(torch.float16).dtype == torch.float32
        assert torch.tensor([1.0], dtype=torch.float16).dtype == torch.float16


def test_attributes_read_what_is_there() -> None:
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float16))
    with Float32Math():
        assert weight.dtype == torch.float16
        assert weight.shape == (2, 3)
        assert weight.size(1) == 3
        assert weight.data_ptr() == weight.data.data_ptr()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_modules_compute_in_float32_over_their_own_weights(dtype: torch.dtype) -> None:
    """Layers as the text encoder, the transformer and the VAE have them; the weights stay what and where they are."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 8, 6, 6, generator=generator).to(dtype)
    module = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Flatten(2), nn.Linear(36, 4), nn.LayerNorm(4)
    ).to(dtype)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in module.state_dict().items()}
    with torch.no_grad(), Float32Math():
        result = module(image)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == dtype
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    with torch.no_grad():
        expected = module.float()(image.float())
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_no_state_is_left() -> None:
    half = torch.ones(2, dtype=torch.float16)
    with Float32Math():
        pass
    assert (half * 2).dtype == torch.float16
    with pytest.raises(ZeroDivisionError), Float32Math():
        1 / 0  # noqa: B018
    assert (half * 2).dtype == torch.float16
    assert half.float().half().dtype == torch.float16


def test_other_threads_are_not_touched() -> None:
    half = torch.ones(2, dtype=torch.float16)
    with Float32Math(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: (half * 2).dtype).result() == torch.float16
        assert (half * 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 1.0], True), ([], True), ([1.0, math.nan], False), ([math.inf], False), ([-math.inf, 0.0], False)],
)
def test_is_finite(values: list[float], expected: bool) -> None:
    for dtype in (torch.float32, *HALF):
        assert is_finite(torch.tensor(values, dtype=dtype)) is expected


def test_a_finite_result_is_computed_once() -> None:
    results: list[Tensor] = []

    def compute() -> Tensor:
        results.append(torch.ones(2, dtype=torch.float16) * 2)
        return results[-1]

    assert finite(compute, "it") is results[0]
    assert len(results) == 1
    assert results[0].dtype == torch.float16


def test_an_overflow_is_computed_again_in_float32() -> None:
    large = torch.full((1,), 60000.0, dtype=torch.float16)
    result = finite(lambda: large * large, "it")
    assert result.dtype == torch.float32
    assert result.item() == 60000.0**2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_stays_non_finite_is_an_error_that_says_what(value: float) -> None:
    tried: list[torch.dtype] = []

    def compute() -> Tensor:
        tried.append((torch.ones(1, dtype=torch.bfloat16) * 2).dtype)
        return torch.tensor([1.0, value])

    with pytest.raises(
        NonFiniteError, match="the text encoder gave NaN or infinity, and again when computed in float32"
    ):
        finite(compute, "the text encoder")
    assert tried == [torch.bfloat16, torch.float32]


def test_other_errors_pass_through() -> None:
    def compute() -> Tensor:
        raise KeyError("x")

    with pytest.raises(KeyError):
        finite(compute, "it")


def test_what_is_written_in_place_is_written() -> None:
    """To the tensor itself, in its own type, from arguments that are widened."""
    tensor, other = torch.full((4,), 60000.0, dtype=torch.float16), torch.ones(4, dtype=torch.float16)
    with Float32Math():
        tensor.mul_(0.5)
        tensor.add_(other)
        tensor[0] = other[0]
    assert tensor.dtype == torch.float16
    assert tensor.tolist() == [1.0, 30000.0, 30000.0, 30000.0]
