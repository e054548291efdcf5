"""Norms and activations in place: the plain expression's bits and gradients, and nobody sees that it was in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zimage.models.layers import activate, is_bare, normalize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Attach = Callable[[nn.Module, Callable[..., Any]], Any]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(width: int, dtype: torch.dtype = torch.float32) -> RMSNorm:
    layer = RMSNorm(width, eps=1e-5)
    layer.weight.data.copy_(noise(width, seed=1))
    return layer.to(dtype).requires_grad_(False)


def replace_forward(module: nn.Module, seen: Callable[[], None]) -> None:
    """As accelerate's and diffusers' offloading do."""
    before = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen()
        return before(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


ATTACH: dict[str, Callable[[nn.Module, Callable[[], None]], Any]] = {
    "forward hook": lambda module, seen: module.register_forward_hook(lambda *_: seen()),
    "pre-hook": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen()),
    "replaced forward": replace_forward,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 64), (2, 7, 3, 16), (1, 5, 3840), (1, 3, 100)])
def test_normalize_has_the_bits_of_the_norm(dtype: torch.dtype, stream: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, hidden = norm(shape[-1], dtype), noise(*shape, dtype=stream)
    given, factor = hidden.clone(), noise(1, 1, shape[-1], dtype=dtype, seed=2)
    expected = layer(hidden)
    for value, reference in (
        (normalize(layer, hidden), expected),
        (normalize(layer, hidden, factor), expected * factor),
        (normalize(layer, hidden, factor.double()), expected * factor.double()),
    ):
        assert value.dtype == reference.dtype
        assert torch.equal(value, reference)
    assert torch.equal(hidden, given)


@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)
def test_what_is_attached_to_a_norm_or_layer_is_called(attach: Callable[..., Any]) -> None:
    calls: list[int] = []
    for layer, apply in ((norm(8), normalize), (nn.Linear(8, 8), activate)):
        assert is_bare(layer)
        attach(layer, lambda: calls.append(1))
        assert not is_bare(layer)
        apply(layer, noise(2, 8))
    assert len(calls) == 2


@pytest.mark.parametrize("attach", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_what_looks_at_gradients_is_called(attach: str) -> None:
    calls: list[int] = []
    layer = norm(8).requires_grad_(True)
    getattr(layer, attach)(lambda *_: calls.append(1))
    assert not is_bare(layer)
    normalize(layer, noise(2, 8).requires_grad_(True)).sum().backward()
    assert calls == [1]


def test_other_norms_are_called_as_they_stand() -> None:
    hidden, factor = noise(2, 8), noise(1, 8, seed=2)
    biased = RMSNorm(8, eps=1e-5, bias=True)
    biased.bias.data.copy_(noise(8, seed=3))
    for layer in (nn.LayerNorm(8), nn.Identity(), RMSNorm(8, eps=1e-5, elementwise_affine=False), biased):
        assert torch.equal(normalize(layer, hidden), layer(hidden))
        assert torch.equal(normalize(layer, hidden, factor), layer(hidden) * factor)


def test_gradients_are_those_of_the_plain_expression() -> None:
    layer = norm(8).requires_grad_(True)
    linear = nn.Linear(8, 8)

    def gradients(plain: bool) -> list[Tensor]:
        hidden = noise(3, 8).requires_grad_(True)
        factor = noise(1, 8, seed=2).requires_grad_(True)
        normal = layer(hidden) * factor if plain else normalize(layer, hidden, factor)
        gate = nn.functional.silu(linear(normal)) if plain else activate(linear, normal)
        return list(torch.autograd.grad((gate**2).sum(), [hidden, factor, *layer.parameters(), *linear.parameters()]))

    for value, reference in zip(gradients(plain=False), gradients(plain=True), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("around", [torch.inference_mode, FakeTensorMode, lambda: torch.device("meta")])
def test_a_norm_can_be_trained_whatever_its_first_call_was_made_in(around: Callable[[], Any]) -> None:
    width = {torch.inference_mode: 11, FakeTensorMode: 13}.get(around, 17)  # of nobody else: what is kept is made here
    layer = RMSNorm(width, eps=1e-5)
    with around():
        given = torch.ones(2, width, device="cpu")
        normalize(RMSNorm(width, eps=1e-5) if around is FakeTensorMode else layer, given)
    hidden = noise(2, width).requires_grad_(True)
    normalize(layer, hidden).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activate_has_the_bits_of_silu(dtype: torch.dtype) -> None:
    layer, hidden = nn.Linear(8, 16).to(dtype), noise(4, 8, dtype=dtype)
    given = hidden.clone()
    with torch.no_grad():
        assert torch.equal(activate(layer, hidden), nn.functional.silu(layer(hidden)))
    assert torch.equal(hidden, given)


def test_nobody_sees_that_it_was_in_place() -> None:
    kept: list[Tensor] = []
    layer, hidden = nn.Linear(8, 8), noise(4, 8)
    layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        activate(layer, hidden)
        assert torch.equal(kept[0], nn.functional.linear(hidden, layer.weight, layer.bias))
        assert torch.equal(activate(nn.Identity(), hidden), nn.functional.silu(noise(4, 8)))
    assert torch.equal(hidden, noise(4, 8))
