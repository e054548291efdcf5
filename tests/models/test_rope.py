"""Rotary embedding: the bits of diffusers' tables, rotations that keep lengths, products that depend on distance."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import RopeEmbedder

from zimage.models.rope import axis_rotations, rotate

AXES, LENGTHS, THETA = (32, 48, 48), (1536, 512, 512), 256.0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_bits_of_diffusers_tables(axis: int) -> None:
    table = RopeEmbedder.precompute_freqs_cis(AXES, LENGTHS, theta=THETA)[axis]
    rotations = axis_rotations(torch.arange(LENGTHS[axis]), AXES[axis], THETA)
    assert rotations.dtype == torch.complex64
    assert torch.equal(rotations, table)


def test_positions_may_be_any() -> None:
    table = axis_rotations(torch.arange(100), 32, THETA)
    some = torch.tensor([3, 99, 0, 3])
    assert torch.equal(axis_rotations(some, 32, THETA), table[some])


def test_angles_by_hand() -> None:
    """Channel pair k of an axis of d channels turns by `position / theta^(2k / d)`."""
    rotations = axis_rotations(torch.tensor([0, 5]), 4, 256.0)
    assert rotations[0].tolist() == [1, 1]
    expected = [complex(math.cos(angle), math.sin(angle)) for angle in (5.0, 5.0 / 16.0)]
    assert rotations[1].tolist() == pytest.approx(expected, abs=1e-6)


def test_rotate_by_hand() -> None:
    """A quarter turn takes neighbouring channels (a, b) to (−b, a)."""
    heads = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    quarter = torch.polar(torch.ones(1, 1, 2), torch.tensor([[[math.pi / 2, 0.0]]]))
    assert rotate(heads, quarter).flatten().tolist() == pytest.approx([-2.0, 1.0, 3.0, 4.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotate_computes_in_float32_and_keeps_the_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 10, 3, 32, generator=generator).to(dtype)
    rotations = axis_rotations(torch.arange(10), 32, THETA)[None]
    rotated = rotate(heads, rotations)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, rotate(heads.float(), rotations).to(dtype))
    torch.testing.assert_close(rotate(heads.float(), rotations).norm(dim=-1), heads.float().norm(dim=-1))


def test_every_head_of_a_token_turns_alike() -> None:
    heads = torch.randn(1, 6, 1, 8, generator=torch.Generator().manual_seed(0)).expand(1, 6, 4, 8)
    rotated = rotate(heads, axis_rotations(torch.arange(6), 8, THETA)[None])
    assert torch.equal(rotated, rotated[:, :, :1].expand_as(rotated))


def test_products_depend_on_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 32, generator=generator)

    def product(at: int, other: int) -> float:
        turned_query = rotate(query, axis_rotations(torch.tensor([at]), 32, THETA)[None])
        turned_key = rotate(key, axis_rotations(torch.tensor([other]), 32, THETA)[None])
        return (turned_query * turned_key).sum().item()

    assert product(3, 10) == pytest.approx(product(1203, 1210), abs=1e-3)
    assert abs(product(3, 10) - product(3, 11)) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_form_for_the_compiler_rotates_alike(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(2, 10, 3, 32, generator=generator).to(dtype)
    rotations = axis_rotations(torch.arange(10), 32, 256.0)[None]
    expected = rotate(heads, rotations)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "view_as_complex", lambda *_: pytest.fail("complex arithmetic"))
    turned = rotate(heads, rotations)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
