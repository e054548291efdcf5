"""Convolutions whose bias goes along, sums and enlargements: the plain bits, and what is hooked is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from zimage.kernels import switch
from zimage.models import layers, pictures
from zimage.models.pictures import add, convolve, convolved, upsample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels are wanted and usable, as on CUDA, but none takes what it is given; their names, as they are asked."""
    asked: list[str] = []
    for module in (pictures, layers):
        monkeypatch.setattr(module, "wanted", lambda hidden: True)
        monkeypatch.setattr(module, "run", lambda name, *args: asked.append(name))
    return asked


@pytest.fixture
def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, 3, stride=2, padding=1).requires_grad_(False)


def test_by_itself_a_module_is_called_as_it_stands(conv: nn.Conv2d) -> None:
    hidden = noise(1, 4, 6, 5)
    values, bias = convolved(conv, hidden)
    assert bias is None
    assert torch.equal(values, conv(hidden))
    assert torch.equal(convolve(conv, hidden), conv(hidden))


def test_a_bias_goes_along_where_kernels_are_used(conv: nn.Conv2d, refused: list[str]) -> None:
    hidden = noise(1, 4, 6, 5)
    values, bias = convolved(conv, hidden)
    assert bias is conv.bias
    assert torch.equal(values, nn.functional.conv2d(hidden, conv.weight, None, stride=2, padding=1))
    assert refused == []
    torch.testing.assert_close(convolve(conv, hidden), conv(hidden))
    assert refused == ["pictures.add"]
    with switch.using("off"):
        assert convolved(conv, hidden)[1] is None
    with torch.enable_grad():
        assert convolved(conv.requires_grad_(True), hidden)[1] is None


def test_only_a_plain_convolution_is_called_without_its_bias(conv: nn.Conv2d, refused: list[str]) -> None:
    class Other(nn.Conv2d):
        pass

    hidden, seen = noise(1, 4, 6, 5), []
    conv.register_forward_hook(lambda *_: seen.append(1))
    assert convolved(conv, hidden)[1] is None
    assert seen == [1]
    assert convolved(Other(4, 8, 3).requires_grad_(False), hidden)[1] is None
    assert convolved(nn.Conv2d(4, 8, 3, bias=False).requires_grad_(False), hidden)[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(refused: list[str], dtype: torch.dtype) -> None:
    update, hidden = noise(1, 8, 3, 4, dtype=dtype), noise(1, 8, 3, 4, dtype=dtype, seed=1)
    bias, hidden_bias = noise(8, dtype=dtype, seed=2), noise(8, dtype=dtype, seed=3)
    wide, hidden_wide = (bias[:, None, None], hidden_bias[:, None, None])
    for arguments, expected in (
        ((bias,), update + wide),
        ((None, hidden), update + hidden),
        ((bias, hidden), (update + wide) + hidden),
        ((bias, hidden.clone(), hidden_bias), (update + wide) + (hidden + hidden_wide)),
    ):
        own = update.clone()
        assert add(own, *arguments) is own
        assert torch.equal(own, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_adds_the_bias_where_no_kernel_does(refused: list[str], dtype: torch.dtype) -> None:
    norm = nn.GroupNorm(4, 8).to(dtype).requires_grad_(False)
    hidden, bias = noise(1, 8, 3, 4, dtype=dtype), noise(8, dtype=dtype, seed=1)
    expected = nn.functional.silu(norm(hidden + bias[:, None, None]))
    assert torch.equal(layers.activate(norm, hidden.clone(), bias), expected)
    assert refused == ["activate_groups"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_upsampling(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """diffusers' own where no kernel takes it; else one convolution with the weight from the kernel."""
    plain = Upsample2D(4, use_conv=True).to(dtype).requires_grad_(False)
    hidden, spread = noise(1, 4, 3, 5, dtype=dtype), noise(4, 4, 4, 4, dtype=dtype, seed=1)
    expected = plain(hidden)
    assert torch.equal(upsample(plain, hidden), expected)
    asked: list[str] = []

    def run(name: str, *args: Any) -> Tensor | None:
        asked.append(name)
        return spread if name == "pictures.spread" and args[0] is plain.conv.weight else None

    monkeypatch.setattr(pictures, "wanted", lambda hidden: True)
    monkeypatch.setattr(pictures, "run", run)
    result = upsample(plain, hidden)
    assert asked == ["pictures.spread", "pictures.add"]
    enlarged = nn.functional.conv_transpose2d(hidden, spread, stride=2, padding=1)
    assert torch.equal(result, enlarged + plain.conv.bias[:, None, None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_upsampling_in_float32_on_a_cpu(
    refused: list[str], monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format, bias: bool
) -> None:
    """As near to the exact picture as diffusers' own, in the layout that the picture has, with four ninths of the
    products; no kernel is asked."""
    module = Upsample2D(32, out_channels=48, use_conv=True, bias=bias).requires_grad_(False)
    hidden = noise(2, 32, 17, 9).contiguous(memory_format=layout)
    exact = copy.deepcopy(module).double()(hidden.double())
    theirs = (module(hidden) - exact).norm()
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("convolved the enlarged picture"))
    for weights in (torch.contiguous_format, torch.channels_last):
        result = upsample(module.to(memory_format=weights), hidden)
        assert result.dtype == torch.float32
        assert result.is_contiguous(memory_format=layout)
        assert (result - exact).norm() < 1.2 * theirs
    assert refused == []


def test_upsampling_of_what_does_not_go_with_the_weight(refused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module, hidden = Upsample2D(4, use_conv=True).bfloat16().requires_grad_(False), noise(1, 4, 3, 5).bfloat16()
    with pytest.raises(RuntimeError, match="type"):
        upsample(module.half(), hidden)
    module = module.bfloat16()
    with torch.enable_grad(), switch.using("off"):
        upsample(module, hidden)
    with torch.enable_grad():
        assert upsample(module.requires_grad_(True), hidden).requires_grad
    module.requires_grad_(False)
    monkeypatch.setattr(pictures, "MOST_NUMBERS", 4 * 4 * 3 * 5)
    assert torch.equal(upsample(module, hidden), module(hidden))
    assert refused == []
    monkeypatch.setattr(pictures, "MOST_NUMBERS", 4 * 4 * 3 * 5 + 1)
    assert torch.equal(upsample(module, hidden), module(hidden))
    assert refused == ["pictures.spread"]


OTHERS: dict[str, Callable[[], Upsample2D]] = {
    "no convolution": lambda: Upsample2D(4),
    "transposed": lambda: Upsample2D(4, use_conv_transpose=True),
    "a norm": lambda: Upsample2D(4, use_conv=True, norm_type="rms_norm", eps=1e-6, elementwise_affine=False),
    "no enlargement": lambda: Upsample2D(4, use_conv=True, interpolate=False),
    "another name": lambda: Upsample2D(4, use_conv=True, name="Conv2d_0"),
    "hooked": lambda: hooked(Upsample2D(4, use_conv=True)),
    "a hooked convolution": lambda: with_conv(hooked(nn.Conv2d(4, 4, 3, padding=1))),
    "1 x 1": lambda: with_conv(nn.Conv2d(4, 4, 1)),
    "a stride": lambda: with_conv(nn.Conv2d(4, 4, 3, padding=1, stride=2)),
    "no padding": lambda: with_conv(nn.Conv2d(4, 4, 3)),
    "a dilation": lambda: with_conv(nn.Conv2d(4, 4, 3, padding=1, dilation=2)),
    "groups": lambda: with_conv(nn.Conv2d(4, 4, 3, padding=1, groups=2)),
    "a rim that is repeated": lambda: with_conv(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    "another class": lambda: with_conv(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))),
}


def hooked(module: Any) -> Any:
    module.register_forward_pre_hook(lambda *_: None)
    return module


def with_conv(conv: nn.Module) -> Upsample2D:
    module = Upsample2D(4, use_conv=True)
    module.conv = conv
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_upsampling_is_called_as_it_stands(
    make: Callable[[], Upsample2D], refused: list[str], dtype: torch.dtype
) -> None:
    module, hidden = make().to(dtype).requires_grad_(False), noise(1, 4, 3, 5).to(dtype)
    assert torch.equal(upsample(module, hidden), module(hidden))
    assert refused == []
