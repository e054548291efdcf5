"""The canvas: padding, crops and scales land where they should, on masks as on pixels, and what stays is put back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zimage import canvas as canvas_module
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


THIN = [((900, 4), (64, 96)), ((3, 1000), (80, 64)), ((1, 700), (64, 64)), ((43, 31), (64, 112)), ((20, 15), (48, 48))]


def whole_then_cropped(image: Any, scaled: tuple[int, int], shown: tuple[int, int]) -> Any:
    how = Image.Resampling.NEAREST if image.dtype == np.bool_ else Image.Resampling.LANCZOS
    channels = np.atleast_3d(image)
    parts = [Image.fromarray(channels[:, :, one]).resize(scaled[::-1], how) for one in range(channels.shape[2])]
    whole = np.stack([np.asarray(part) for part in parts], axis=-1)
    top, left = ((all_of - some) // 2 for all_of, some in zip(scaled, shown, strict=True))
    return np.clip(whole, 0, 255 if image.dtype == np.uint8 else 1)[top : top + shown[0], left : left + shown[1]]


@pytest.mark.parametrize(("size", "shown"), THIN)
def test_what_is_cut_before_it_is_scaled_is_as_if_it_was_cut_after(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    """And the bits of scaling all of it where that is not many times the picture."""
    image, ratio = np.random.default_rng(2).random((*size, 3), dtype=np.float32), max(np.divide(shown, size))
    scaled = max(shown[0], round(size[0] * ratio)), max(shown[1], round(size[1] * ratio))
    steps = np.round(image * 255).astype(np.uint8)
    is_large = scaled[0] * scaled[1] > 8 * shown[0] * shown[1]
    for most in (canvas_module._MOST, 0):
        monkeypatch.setattr(canvas_module, "_MOST", most)
        for part, bound, share in ((image, 1e-3, 1.0), (steps, 2, 1e-2), (image[:, :, 0] > 0.5, 1, 1e-2)):
            fitted = np.atleast_3d(canvas_module._fit(part, *shown, 16)).astype(np.float64)
            apart = np.abs(fitted - whole_then_cropped(part, scaled, shown))
            assert apart.shape[:2] == shown
            assert apart.max() <= (bound if is_large or not most else 0)
            assert (apart > 0).mean() <= share


@pytest.mark.parametrize("kind", ["bytes", "numbers", "mask", "control"])
def test_of_a_thin_image_only_what_stays_is_scaled(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A file of 1 kB, which covers the picture if it is made 250 times as large."""
    thin = np.zeros((65000, 4, 3), dtype=np.float32 if kind == "numbers" else np.uint8)
    thin[32500:] = 1 if kind == "numbers" else 255
    resize, made = Image.Image.resize, []

    def counted(image: Image.Image, size: tuple[int, int], *given: Any) -> Image.Image:
        made.append(size)
        assert size[0] * size[1] <= 8 * 1024 * 1024
        assert image.width * image.height <= 4 * 65000
        return resize(image, size, *given)

    monkeypatch.setattr(Image.Image, "resize", counted)
    asked: dict[str, Any] = {"height": 1024, "width": 1024, "any_size": True, "seed": 1}
    if kind == "control":
        request = GenerationRequest("", control_image=read_image(thin, "control_image"), **asked).resolve(TURBO)
        pixels = lay_out_control(request, Limits())
    else:
        canvas = make(thin, thin[:, :, 0] > 0 if kind == "mask" else None, height=1024, width=1024)
        pixels = canvas.pixels if kind != "mask" else canvas.painted.float()
    assert made
    assert pixels.shape[2:] == (1024, 1024)
    assert pixels[0, 0, :256].max() < 0.1
    assert pixels[0, 0, 768:].min() > 0.9
    assert pixels[0, 0, 500, 0] < 0.5 < pixels[0, 0, 524, 0]


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
