"""The canvas: padding, crops and scales land where they should, on masks as on pixels, and what stays is put back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zimage.canvas import Canvas, lay_out, lay_out_control
from zimage.errors import RequestError
from zimage.files.images import read_image, read_mask
from zimage.models.autoencoder import to_image
from zimage.request import GenerationRequest
from zimage.rules import Limits
from zimage.variants import TURBO

BYTES = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
MILD = BYTES // 2 + 64
"""Nothing of it is cut off when it is scaled."""


def make(image: Any = BYTES, mask: Any = None, **asked: Any) -> Canvas:
    sources = {"image": read_image(image)} | ({} if mask is None else {"mask_image": read_mask(mask)})
    request = GenerationRequest("", any_size=True, seed=1, **sources, **asked).resolve(TURBO)
    canvas = lay_out(request, Limits())
    assert canvas.pixels.shape == (1, 3, request.height, request.width)
    assert canvas.painted.shape == canvas.added.shape == (1, 1, request.height, request.width)
    return canvas


def as_bytes(canvas: Canvas) -> Any:
    return np.asarray(to_image(canvas.pixels))


def test_an_image_is_cropped_evenly_to_multiples_of_16() -> None:
    assert np.array_equal(as_bytes(make()), BYTES[1:49, 3:67])


def test_every_byte_survives_being_a_number() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[:, :, None], 3, axis=2)
    assert np.array_equal(as_bytes(make(ramp)), ramp)


def test_padding_repeats_the_edge_and_is_marked() -> None:
    canvas = make(BYTES[:48, :64], padding=(16, 32, 0, 16))
    assert np.array_equal(as_bytes(canvas)[32:80, 16:], BYTES[:48, :64])
    assert np.array_equal(as_bytes(canvas)[:32, 16:], np.repeat(BYTES[:1, :64], 32, axis=0))
    assert not canvas.added[0, 0, 32:80, 16:].any()
    assert canvas.added.sum() == 96 * 80 - 48 * 64
    assert not canvas.painted.any()


def test_an_odd_padding_is_cropped_and_repaints_every_square_that_it_touches() -> None:
    canvas = make(BYTES[:48, :64], padding=(0, 0, 60, 0))  # 124 wide: 6 pixels are cut off on either side
    assert np.array_equal(as_bytes(canvas)[:, :58], BYTES[:48, 6:64])
    assert canvas.added[0, 0, 0].tolist() == [False] * 58 + [True] * 54
    assert canvas.repaint(8)[0, 0, 0].tolist() == [False] * 7 + [True] * 7


def test_masks_go_with_the_image() -> None:
    mask = np.zeros((50, 70), dtype=bool)
    mask[10:30, 20:40] = True
    canvas = make(mask=mask)
    assert np.array_equal(canvas.painted[0, 0].numpy(), mask[1:49, 3:67])
    corners = mask[1:49, 3:67][::8, ::8]
    assert np.array_equal(canvas.repaint(8)[0, 0].numpy(), corners)
    padded = make(mask=mask, padding=(2, 0, 8, 14))
    assert np.array_equal(padded.painted[0, 0, :50, 2:72].numpy(), mask)
    assert padded.added.sum() == 64 * 80 - 50 * 70


@pytest.mark.parametrize("image", [MILD, MILD.astype(np.float32) / 255], ids=["bytes", "numbers"])
def test_a_size_that_was_asked_for_scales_to_cover_it(image: Any) -> None:
    mask = np.zeros((50, 70), dtype=bool)
    mask[:, :35] = True
    canvas = make(
        image, mask, height=96, width=112
    )  # scaled by 1.92 to 134 wide, of which 11 are cut off left and right
    scaled = Image.fromarray(MILD).resize((134, 96), Image.Resampling.LANCZOS)
    assert np.abs(as_bytes(canvas).astype(int) - np.asarray(scaled)[:, 11:123]).max() <= (0 if image is MILD else 1)
    assert canvas.painted[0, 0].float().mean(dim=0).tolist() == [1.0] * 56 + [0.0] * 56


def test_what_is_not_repainted_is_put_back_bit_for_bit() -> None:
    mask = np.zeros((50, 70), dtype=bool)
    mask[10:30, 20:40] = True
    canvas = make(BYTES.astype(np.float32) / 255 * 0.99, mask, padding=(0, 0, 16, 0))
    drawn = torch.rand(canvas.pixels.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = canvas.put_back(drawn)
    repaint = (canvas.painted | canvas.added).expand_as(result)
    assert torch.equal(result[repaint], drawn.float()[repaint])
    assert torch.equal(result[~repaint], canvas.pixels[~repaint])
    assert 0 < repaint.float().mean() < 0.6


def test_a_mask_too_thin_to_repaint_anything_is_refused() -> None:
    mask = np.zeros((48, 64), dtype=bool)
    mask[1:8, 1:8] = True
    with pytest.raises(RequestError, match="mask_image marks is too small to be repainted; it takes a square of 8x8"):
        make(BYTES[:48, :64], mask)
    make(BYTES[:48, :64], mask, padding=(16, 0, 0, 0))


def test_an_image_that_is_known_by_its_digest_only_is_asked_for() -> None:
    request = GenerationRequest("", image=read_image(BYTES), any_size=True).resolve(TURBO)
    object.__setattr__(request.image, "pixels", None)
    with pytest.raises(RequestError, match="image is known by its digest only, as a recipe has it; pass image itself"):
        lay_out(request, Limits())


def test_what_is_repainted_is_cut_out_in_grey() -> None:
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[:, 40:] = 255
    canvas = make(BYTES[:48, :64], mask, padding=(0, 16, 0, 0))
    cut = canvas.cut_out()
    repainted = (canvas.painted | canvas.added).expand(-1, 3, -1, -1)
    assert repainted.sum() == 3 * (16 * 64 + 48 * 24)
    assert torch.equal(cut, torch.where(repainted, 0.5, canvas.pixels))
    assert np.array_equal(as_bytes(canvas)[16:], BYTES[:48, :64])


@pytest.mark.parametrize("of_bytes", [True, False])
def test_a_control_image_is_fitted_to_the_picture(of_bytes: bool) -> None:
    control = MILD if of_bytes else MILD.astype(np.float32) / 255
    asked = {"any_size": True, "seed": 1, "control_image": read_image(control, "control_image")}
    own = GenerationRequest("", **asked).resolve(TURBO)
    assert (own.height, own.width) == (48, 64)
    assert np.array_equal(np.asarray(to_image(lay_out_control(own, Limits()))), MILD[1:49, 3:67])
    beside = GenerationRequest("", image=read_image(BYTES[:32, :64]), **asked).resolve(TURBO)
    pixels = lay_out_control(beside, Limits())  # 70 x 50 scaled to cover 64 x 32
    scaled = np.asarray(Image.fromarray(MILD).resize((64, 46), Image.Resampling.LANCZOS))[7:39]
    assert pixels.shape == (1, 3, 32, 64)
    assert np.abs(np.asarray(to_image(pixels)).astype(int) - scaled).max() <= (0 if of_bytes else 1)


def test_a_control_image_that_is_not_there() -> None:
    asked = GenerationRequest("", any_size=True, seed=1, control_image=read_image(BYTES, "control_image"))
    known = asked.resolve(TURBO)
    assert known.control_image is not None
    with pytest.raises(RequestError, match="control_image is known by its digest only"):
        lay_out_control(replace(known, control_image=replace(known.control_image, pixels=None)), Limits())


def test_a_tensor_is_not_shared_with_the_canvas() -> None:
    """Its pixels lie as those of a canvas do already, and are nobody's to write to."""
    given = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(0))
    asked = replace(GenerationRequest("a fox", any_size=True), image=read_image(given))
    pixels = lay_out(asked.resolve(TURBO), Limits()).pixels
    assert torch.equal(pixels[0], given)
    assert pixels.data_ptr() != given.data_ptr()
