"""Each kernel beside the plain expression: the same roundings in half precision, and nothing else read or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.overrides import TorchFunctionMode

from zimage.kernels import fused
from zimage.models.precision import Float32Math
from zimage.models.rope import rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]
EPS = 1e-5


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.dtype]]:
    """The types of the tensors of every launch."""
    seen: list[list[torch.dtype]] = []
    launch = fused._launch

    def note(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        seen.append([value.dtype for value in args if isinstance(value, Tensor)])
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(fused, "_launch", note)
    return seen


def norm(weight: Tensor, hidden: Tensor, eps: float = EPS) -> Tensor:
    """diffusers' own."""
    layer = RMSNorm(len(weight), eps=eps)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer(hidden)


def turns(noise: Callable[..., Tensor], *shape: int) -> Tensor:
    angles = 3.0 * noise(*shape)
    return torch.polar(torch.ones_like(angles), angles)


def agrees(value: Tensor | None, reference: Tensor, dtype: torch.dtype | None = None) -> None:
    """What was computed in half precision (`dtype`, if not that of the result) has the same bits but where a sum of
    another order rounds the other way: a step, seldom."""
    assert value is not None
    assert (value.dtype, value.shape) == (reference.dtype, reference.shape)
    step = torch.finfo(dtype or value.dtype).eps
    torch.testing.assert_close(value, reference, rtol=max(2e-6, 2 * step), atol=max(2e-6, 2 * step if dtype else 0.0))
    if step > 1e-6:
        assert value.isclose(reference, rtol=1e-6, atol=1e-6).float().mean().item() >= 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 64), (1, 2, 3840), (3, 1, 5000)], ids=str)
def test_normalize(
    noise: Callable[..., Tensor], dtype: torch.dtype, stream: torch.dtype, shape: tuple[int, ...]
) -> None:
    hidden, weight = noise(*shape, dtype=stream), noise(shape[-1], dtype=dtype)
    given = hidden.clone()
    for factor in (None, noise(1, 1, shape[-1], dtype=dtype), noise(shape[0], 1, shape[-1], dtype=dtype)):
        expected = norm(weight, hidden) if factor is None else norm(weight, hidden) * factor
        # diffusers' product with a float32 weight is rounded to no other type.
        agrees(fused.normalize(hidden, weight, factor, EPS), expected.to(dtype))
    assert torch.equal(hidden, given)


def test_rows_of_any_shape_without_a_factor(noise: Callable[..., Tensor]) -> None:
    hidden, weight = noise(2, 7, 3, 16), noise(16)
    agrees(fused.normalize(hidden, weight, None, EPS), norm(weight, hidden))


@pytest.mark.parametrize("width", [16, 3840])
def test_a_row_depends_on_no_other(noise: Callable[..., Tensor], width: int) -> None:
    hidden, weight = noise(1, 5, width), noise(width)
    alone = fused.normalize(hidden[:, 3:4].contiguous(), weight, None, EPS)
    hidden[:, 2], hidden[:, 4] = torch.nan, 1e10
    among = fused.normalize(hidden, weight, None, EPS)
    assert among is not None
    assert alone is not None
    assert torch.equal(among[:, 3:4], alone)
    assert among[:, 2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 48), (1, 2, 3840)], ids=str)
@pytest.mark.parametrize("gates", [0, 1, None], ids=["no gate", "one gate", "a gate for each"])
def test_add(noise: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, ...], gates: int | None) -> None:
    """As blocks have it in each type: in float16 the stream and what comes to it are float32."""
    stream = torch.float32 if dtype == torch.float16 else dtype
    tokens, update = noise(*shape, dtype=stream), noise(*shape, dtype=stream)
    weight, following = noise(shape[-1], dtype=dtype), noise(shape[-1], dtype=dtype)
    count = shape[0] if gates is None else gates
    gate, factor = (noise(count, 1, shape[-1], dtype=dtype) if count else None for _ in range(2))
    given = tokens.clone(), update.clone()
    added = tokens + (norm(weight, update) if gate is None else norm(weight, update) * gate)
    agrees(fused.add_normalized(tokens, update, weight, gate, EPS), added, dtype)
    both = fused.add_then_normalize(tokens, update, weight, gate, EPS, following, factor, 2 * EPS)
    assert both is not None
    agrees(both[0], added, dtype)
    # Of what the kernel itself added: a step there is more than one after the norm.
    normal = norm(following, both[0], 2 * EPS)
    agrees(both[1], normal if factor is None else normal * factor)
    assert torch.equal(tokens, given[0])
    assert torch.equal(update, given[1])


def test_what_float16_could_not_hold_is_added(noise: Callable[..., Tensor]) -> None:
    tokens, update = 1e6 * noise(1, 3, 64), 1e6 * noise(1, 3, 64)
    weight, gate = noise(64, dtype=torch.float16), noise(1, 1, 64, dtype=torch.float16)
    added = fused.add_normalized(tokens, update, weight, gate, EPS)
    torch.testing.assert_close(added, tokens + norm(weight, update) * gate, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(70, 4, 16), (9, 3, 12), (9, 12, 64), (3, 30, 128)])
def test_rotate(noise: Callable[..., Tensor], dtype: torch.dtype, tokens: int, heads: int, size: int) -> None:
    packed = noise(2, tokens, 3, heads, size, dtype=dtype)
    given = packed.clone()
    weights = noise(size, dtype=dtype), noise(size, dtype=dtype)
    for rotations in (turns(noise, 1, tokens, size // 2), turns(noise, 2, tokens + 2, size // 2)[:, 2:]):
        views = packed[:, :, 0], packed[:, :, 1]
        apart = views[0].contiguous(), views[1].transpose(1, 2).contiguous().transpose(1, 2)
        expected = [rotate(norm(weight, view), rotations) for weight, view in zip(weights, views, strict=True)]
        for query, key in (views, apart):
            turned = fused.rotate_normalized(query, key, *weights, rotations, EPS, EPS)
            assert turned is not None
            agrees(turned[0], expected[0])
            agrees(turned[1], expected[1])
    assert torch.equal(packed, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "keys", "size"), [(70, 4, 2, 16), (9, 6, 1, 8), (3, 32, 8, 128)])
def test_rotate_halves(
    noise: Callable[..., Tensor], dtype: torch.dtype, tokens: int, heads: int, keys: int, size: int
) -> None:
    """Channel i with i + size / 2, and keys of fewer heads, as language models have them."""
    given = noise(2, tokens, heads, size, dtype=dtype), noise(2, tokens, keys, size, dtype=dtype)
    weights, rotations = (noise(size, dtype=dtype), noise(size, dtype=dtype)), turns(noise, 1, tokens, size // 2)
    turned = fused.rotate_normalized(*given, *weights, rotations, EPS, EPS, True)
    assert turned is not None
    for result, one, weight in zip(turned, given, weights, strict=True):
        pairs = norm(weight, one).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        expected = rotate(pairs, rotations).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        agrees(result, expected)


def test_a_sum_without_a_norm_before_it(noise: Callable[..., Tensor]) -> None:
    tokens, update, weight = noise(2, 5, 48), noise(2, 5, 48), noise(48)
    added = fused.add_then_normalize(tokens, update, None, None, 0.0, weight, None, EPS)
    assert added is not None
    assert torch.equal(added[0], tokens + update)
    agrees(added[1], norm(weight, tokens + update))
    assert fused.add_then_normalize(tokens, update.double(), None, None, 0.0, weight, None, EPS) is None


def test_queries_and_keys_have_their_own_eps(noise: Callable[..., Tensor]) -> None:
    heads, weight, rotations = noise(1, 2, 2, 8), noise(8), turns(noise, 1, 2, 4)
    turned = fused.rotate_normalized(heads, heads, weight, weight, rotations, 1.0, 3.0)
    assert turned is not None
    for result, eps in zip(turned, (1.0, 3.0), strict=True):
        plain = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps) * weight
        torch.testing.assert_close(result, rotate(plain, rotations))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-8])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 170), (1, 3, 2048), (1, 1)], ids=str)
def test_gate(
    noise: Callable[..., Tensor], dtype: torch.dtype, scale: float, in_place: bool, shape: tuple[int, ...]
) -> None:
    opening, content = 4 * noise(*shape, dtype=dtype), noise(*shape, dtype=dtype)
    given = opening.clone(), content.clone()
    expected = silu(opening) * (content * scale)
    result = fused.gate(opening, content, scale, in_place)
    agrees(result, expected)
    assert (result is opening) == in_place
    assert in_place or torch.equal(opening, given[0])
    assert torch.equal(content, given[1])


def test_the_scale_comes_before_the_product(noise: Callable[..., Tensor]) -> None:
    """30000 · 10 is beyond float16 until it is scaled."""
    opening, content = (noise(1, 8, dtype=torch.float16).fill_(value) for value in (10.0, 30000.0))
    result = fused.gate(opening, content, 2.0**-8, False)
    assert result is not None
    assert result[0, 0].item() == pytest.approx(10 * 30000 / 256, rel=1e-3)


def test_what_no_kernel_was_written_for(noise: Callable[..., Tensor], launches: list[Any]) -> None:
    """The plain expression knows what to do, or which error to raise."""
    hidden, weight, factor = noise(2, 4, 8), noise(8), noise(2, 1, 8)
    double = hidden.double()
    for arguments in (
        (double, weight, factor),
        (hidden, weight.double(), None),
        (hidden, weight, factor.half()),
        (hidden, weight[:4], None),
        (hidden.transpose(0, 1), weight, None),
        (hidden, weight, noise(2, 4, 8)),
        (hidden, weight, noise(8)),
        (hidden[None], weight, factor),
        (hidden[:0], weight, None),
        (noise(1, 16385), noise(16385), None),
    ):
        assert fused.normalize(*arguments, EPS) is None
    for tokens in (double, hidden[:1], hidden.half(), hidden.transpose(0, 1)):
        assert fused.add_normalized(tokens, hidden, weight, factor, EPS) is None
    for following in ((weight[:4], None), (weight, noise(3, 1, 8)), (weight, factor.half())):
        assert fused.add_then_normalize(hidden, hidden, weight, factor, EPS, *following, EPS) is None
    heads, rotations = noise(2, 4, 3, 8), turns(noise, 1, 4, 4)
    for query, key, other in (
        (heads[:, :, :2], heads, rotations),
        (heads, heads[:, :3], rotations),
        (heads, heads.half(), rotations),
        (heads[..., :7], heads[..., :7], rotations),
        (heads.transpose(2, 3), heads.transpose(2, 3), rotations),
        (heads, heads, rotations.to(torch.complex128)),
        (heads, heads, rotations.conj()),
        (heads, heads, rotations[:, :3]),
        (heads, heads, turns(noise, 3, 4, 4)),
    ):
        assert fused.rotate_normalized(query, key, weight[: query.shape[3]], weight, other, EPS, EPS) is None
    six = noise(1, 4, 2, 6)
    assert fused.rotate_normalized(six, six, weight[:6], weight[:6], turns(noise, 1, 4, 3), EPS, EPS, True) is None
    for content in (double, hidden[:1], hidden.half(), hidden.transpose(1, 2)):
        assert fused.gate(hidden, content, 1.0, False) is None
    assert launches == []


def calls(noise: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of every kernel in half precision."""
    tokens, update, weight = (noise(*shape, dtype=dtype) for shape in ((2, 5, 16), (2, 5, 16), (16,)))
    factor, heads = noise(2, 1, 16, dtype=dtype), noise(2, 5, 3, 16, dtype=dtype)
    return {
        "normalize": (tokens, weight, factor, EPS),
        "add_normalized": (tokens, update, weight, factor, EPS),
        "add_then_normalize": (tokens, update, weight, factor, EPS, weight, factor, EPS),
        "rotate_normalized": (heads, heads, weight, weight, turns(noise, 1, 5, 8), EPS, EPS),
        "gate": (tokens, update, 2.0**-8, True),
    }


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["normalize", "add_normalized", "add_then_normalize", "rotate_normalized", "gate"])
def test_float32_math_widens_the_arguments(
    noise: Callable[..., Tensor], launches: list[list[torch.dtype]], name: str, dtype: torch.dtype
) -> None:
    arguments, kernel = calls(noise, dtype)[name], getattr(fused, name)
    given = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    with Float32Math():
        results = kernel(*arguments)
    assert launches == [[torch.float32] * len(launches[0])]
    for value, before in zip(arguments, given, strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, before)
    wide = [value.float() if isinstance(value, Tensor) and value.dtype == dtype else value for value in arguments]
    expected = kernel(*wide)
    for result, reference in zip(*(one if type(one) is tuple else (one,) for one in (results, expected)), strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, reference)


def test_float32_math_lets_a_float32_tensor_be_written_to(noise: Callable[..., Tensor]) -> None:
    opening, content = noise(2, 8), noise(2, 8)
    with Float32Math():
        assert fused.gate(opening, content, 1.0, True) is opening


def test_any_mode_sees_the_kernels(noise: Callable[..., Tensor]) -> None:
    seen: list[Any] = []

    class Note(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    arguments = calls(noise, torch.float32)
    with Note():
        for name, values in arguments.items():
            getattr(fused, name)(*values)
    assert seen == [getattr(fused, name) for name in arguments]
