"""Attention between pixels in chunks of rows: the numbers of torch's, and what is not plain is called as it stands."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from zimage import ZImagePipeline
from zimage.kernels.switch import using
from zimage.memory.meter import AllocationMeter
from zimage.models import autoencoder, pixel_attention
from zimage.models.pixel_attention import attend, attention

WIDTH = 288
"""Channels of a head that is wide enough, in groups of 32."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a card: in chunks. The numbers of rows that were attended to."""
    seen: list[int] = []

    def noted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append(len(query))
        return attention(query, key, value)

    monkeypatch.setattr(pixel_attention, "wanted", lambda hidden: True)
    monkeypatch.setattr(pixel_attention, "_is_faster", lambda hidden: True)
    monkeypatch.setattr(pixel_attention, "attention", noted)
    return seen


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def plain(**options: Any) -> Attention:
    torch.manual_seed(0)
    given: dict[str, Any] = {"heads": 1, "dim_head": WIDTH, "norm_num_groups": 32, "bias": True}
    module = Attention(WIDTH, residual_connection=True, **(given | options))
    module.to_q.weight.mul_(4)  # so that pixels look at some more than at others
    return module.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("most", [1, 3 * 23, 10 * 23 + 5, 2**24])
def test_chunks_of_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: int) -> None:
    """Of one row, of some that divide and do not, and of all; more keys than queries."""
    monkeypatch.setattr(pixel_attention, "MOST_SCORES", most)
    query, key, value = (noise(rows, 8, dtype=dtype, seed=rows) for rows in (15, 23, 24))
    value = value[:23]
    expected = scaled_dot_product_attention(*(one.float()[None] for one in (query, key, value)), scale=1.0)[0]
    result = attention(query, key, value)
    assert result.dtype == dtype
    assert (result.float() - expected).norm() < max(1e-6, torch.finfo(dtype).eps / 2) * expected.norm()


def test_no_more_than_some_chunks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_attention, "MOST_SCORES", 2**14)
    rows = noise(1024, 4)
    with AllocationMeter() as meter:
        attention(rows, rows, rows)
    assert 4 * 2**14 < meter.peak < 4 * 4 * 2**14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_module(forced: list[int], dtype: torch.dtype) -> None:
    """As near to it in float32 as it is itself."""
    module, hidden = plain().to(dtype), noise(1, WIDTH, 5, 7, dtype=dtype)
    exact, expected = copy.deepcopy(module).float()(hidden.float()), module(hidden)
    error, change = (expected.float() - exact).norm(), (exact - hidden.float()).norm()
    for layout in (torch.channels_last, torch.contiguous_format):
        given = hidden.clone(memory_format=layout)
        result = attend(module, given)
        assert torch.equal(given, hidden)
        assert result.shape == hidden.shape
        assert result.dtype == dtype
        assert (result.float() - exact).norm() < 1.2 * error + 1e-6 * change
    assert forced == [35, 35]


def test_by_itself_and_without_kernels_it_is_called(forced: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    module, hidden = plain(), noise(1, WIDTH, 3, 4)
    with using("off"):
        attend(module, hidden)
    with torch.enable_grad():
        assert attend(module, hidden).requires_grad
    monkeypatch.undo()
    assert torch.equal(attend(module, hidden), module(hidden))
    assert forced == []


def hooked(place: Callable[[Attention], nn.Module]) -> Attention:
    module = plain()
    place(module).register_forward_hook(lambda *_: None)
    return module


def given(**attributes: Any) -> Attention:
    module = plain()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


class Other(Attention):
    pass


OTHERS: dict[str, Callable[[], Attention]] = {
    "hooked": lambda: hooked(lambda module: module),
    "a hooked layer": lambda: hooked(lambda module: module.to_out[0]),
    "a hooked norm": lambda: hooked(lambda module: module.group_norm),
    "two heads": lambda: plain(heads=2, dim_head=WIDTH // 2),
    "a narrow head": lambda: plain(dim_head=256),
    "another processor": lambda: plain(processor=AttnProcessor()),
    "no norm": lambda: plain(norm_num_groups=None),
    "norms of queries": lambda: plain(qk_norm="layer_norm"),
    "no bias": lambda: plain(bias=False),
    "another scale": lambda: plain(rescale_output_factor=2.0),
    "no sum": lambda: given(residual_connection=False),
    "another layer": lambda: given(to_v=nn.Sequential(nn.Linear(WIDTH, WIDTH))),
    "another class": lambda: Other(WIDTH, heads=1, dim_head=WIDTH, norm_num_groups=32, bias=True),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_what_is_not_plain_is_called_as_it_stands(make: Callable[[], Attention], forced: list[int]) -> None:
    module, hidden = make(), noise(1, WIDTH, 3, 4)
    assert torch.equal(attend(module, hidden), module(hidden))
    assert forced == []


def test_dropout_in_training_is_left_to_it(forced: list[int]) -> None:
    module, hidden = plain(dropout=0.5), noise(1, WIDTH, 3, 4)
    attend(module, hidden)
    assert forced == [12]
    attend(module.train(), hidden)
    assert forced == [12]


def test_the_middle_of_a_decoder(forced: list[int]) -> None:
    """With its residuals; as it stands where the rest is in strips."""
    torch.manual_seed(0)
    block = UNetMidBlock2D(WIDTH, None, attention_head_dim=WIDTH, resnet_groups=32, resnet_eps=1e-6).eval()  # type: ignore[arg-type]
    hidden = noise(1, WIDTH, 5, 4)
    expected = block(hidden)
    torch.testing.assert_close(autoencoder._middle(block, hidden, 0), expected)
    assert forced == [20]
    torch.testing.assert_close(autoencoder._middle(block, hidden, 1), expected)
    assert forced == [20]


@pytest.mark.parametrize("levels", [0, 1])
def test_both_halves_of_an_autoencoder(base: ZImagePipeline, monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    seen: list[Any] = []

    def noted(module: Any, hidden: Tensor) -> Tensor:
        seen.append(module)
        return attend(module, hidden)

    monkeypatch.setattr(autoencoder, "attend", noted)
    vae = base.autoencoder.vae
    base.autoencoder.decode(noise(1, 16, 4, 2), levels)
    base.autoencoder.encode(noise(1, 3, 32, 16).sigmoid(), None, levels)
    assert seen == ([] if levels else [*vae.decoder.mid_block.attentions, *vae.encoder.mid_block.attentions])
