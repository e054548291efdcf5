"""Images and masks that a picture starts from, read from whatever holds one: a file or its bytes, Pillow, an array or a
tensor.

The outcome is a `SourceImage` or a `RequestError`; files may come from anyone. What is transparent in an image lies on
white. Orientation in EXIF is followed; colour profiles are not. Loads no torch; sizes and masks that do not fit are
its callers' business.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ..editing import SourceImage
from ..errors import RequestError
from ..rules import is_tensor, shown
from .png import MAX_FILE_BYTES, MAX_PIXELS, brief, regular_file

Array = npt.NDArray[Any]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that files are read in: all that Pillow decodes by itself, without another program."""
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of grey in 16 bits: in "I" it opens such PNG files."""
DEEPEST = 65535


def read_image(value: Any, name: str = "image") -> SourceImage:
    """The image in a path, the bytes of a file or an open one, which is read from its beginning, a Pillow image, an
    array (height, width, 3) or a tensor (3, height, width).

    `name` is what errors call it. Pixels of bytes stay so; other numbers must be in [0, 1] and stay as they are, in
    float32. Grey becomes RGB. Raises `RequestError` for what is no image, is damaged, or has more pixels than any
    picture.
    """
    if isinstance(value, SourceImage):
        return value
    pixels = _opaque(_pixels(name, value))
    return SourceImage(pixels.shape[1], pixels.shape[0], _digest(pixels), _frozen(pixels))


def read_mask(value: Any) -> SourceImage:
    """The mask in whatever `read_image` reads, or in booleans: True where its brightness is half or more.

    What is transparent is black. Raises `RequestError` as `read_image` does, and for a mask that is black everywhere.
    """
    if isinstance(value, SourceImage):
        return value
    white = _brightness(_pixels("mask_image", value)) >= 0.5
    if not white.any():
        raise RequestError(
            "mask_image is black everywhere, so there is nothing to repaint; white (255 of bytes, 1 of other numbers) "
            "marks what is"
        )
    return SourceImage(white.shape[1], white.shape[0], _digest(white), _frozen(white))


READERS: dict[str, Callable[[Any], SourceImage]] = {
    "image": read_image,
    "mask_image": read_mask,
    "control_image": partial(read_image, name="control_image"),
}
"""What reads each of a request's images."""


def _pixels(name: str, value: Any) -> Array:
    """(height, width, channels) of bytes, or of numbers in [0, 1] in float32."""
    if isinstance(value, str | os.PathLike):
        if (path := brief(value)).startswith(("http://", "https://")):
            raise RequestError(f"{name} is an address; download the file and pass its path")
        with regular_file(value, path) as file:
            return _of_file(path, file)
    if isinstance(value, bytes | bytearray | memoryview):
        return _of_bytes(name, value)
    if isinstance(value, Image.Image):
        return _of_pillow(name, value)
    if is_tensor(value):
        return _of_array(name, _from_tensor(name, value), value)
    if isinstance(value, np.ndarray):
        return _of_array(name, value[0] if value.ndim == 4 and len(value) == 1 else value, value)
    if hasattr(value, "read"):
        return _of_bytes(name, _content(name, value))
    raise RequestError(
        f"{name} must be a path, the bytes of an image file or an open one, a Pillow image, an array (height, width, "
        f"3) or a tensor (3, height, width); got {shown(value)}"
    )


def _content(name: str, file: Any) -> bytearray:
    """All that is in an open file, from its beginning where it can go back there, or a byte more than is read."""
    content = bytearray()
    try:
        with suppress(AttributeError, OSError, ValueError):
            file.seek(0)
        while len(content) <= MAX_FILE_BYTES and (part := file.read(min(2**20, MAX_FILE_BYTES + 1 - len(content)))):
            content += part
    except Exception as error:  # whatever an object with `read` raises, or the sum where that gives no bytes
        raise RequestError(
            f"{name} is a file that cannot be read ({error}); pass one that is open for reading in binary mode"
        ) from None
    return content


def _of_bytes(name: str, content: bytes | bytearray | memoryview) -> Array:
    size = memoryview(content).nbytes
    if size > MAX_FILE_BYTES:
        raise RequestError(f"{name} has more than {MAX_FILE_BYTES / 2**20:.0f} MiB, and no more are read")
    return _of_file(f"{name} ({size} bytes)", io.BytesIO(bytes(content)))


def _of_file(name: str, file: IO[bytes]) -> Array:
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise RequestError(f"{name} is no image that can be read; these formats are: {known}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # by its size in the header
        limit = MAX_PIXELS / 1e6
        raise RequestError(
            f"{name} is too large, or says so ({error}); up to {limit:.0f} megapixels are read"
        ) from None
    except Exception as error:  # Pillow raises whatever a damaged file leads it to
        raise RequestError(f"{name} cannot be read as an image: {error}") from None
    return _of_pillow(name, opened)


def _of_pillow(name: str, image: Image.Image) -> Array:
    _check_size(name, image.height, image.width)
    if image.mode == "F":
        raise RequestError(f"{name} is of Pillow's mode F, whose numbers have no range; pass an array in [0, 1]")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in DEEP_MODES:
            return _deep(name, np.asarray(image))
        if image.mode in ("1", "L", "RGB") and not image.has_transparency_data:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        if image.mode == "La":
            image = image.convert("LA")
        return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    except RequestError:
        raise
    except Exception as error:  # of a damaged file, or of a mode that has no way to RGB
        raise RequestError(
            f"{name} ({image.mode}) is damaged, cut off, or has no colours that are known: {error}"
        ) from None


def _deep(name: str, grey: Array) -> Array:
    if grey.min() < 0 or grey.max() > DEEPEST:
        raise RequestError(
            f"{name} has values from {grey.min()} to {grey.max()}, and its mode is for 0 to {DEEPEST}; convert it to "
            "8 bits, or pass an array of numbers in [0, 1]"
        )
    return np.repeat((grey / np.float32(DEEPEST)).astype(np.float32)[:, :, None], 3, axis=2)


def _from_tensor(name: str, tensor: Any) -> Array:
    """Channels last, and no batch of one; of a plain (height, width) neither."""
    try:
        plain = tensor.detach().cpu()
        array: Array = (plain.float() if plain.is_floating_point() else plain).numpy()
    except (RuntimeError, TypeError) as error:  # sparse, quantized, or on the meta device
        said = str(error).splitlines()[0]
        raise RequestError(f"{name} is a tensor whose values cannot be read ({said}); pass a dense one") from None
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    return np.moveaxis(array, 0, -1) if array.ndim == 3 else array


def _of_array(name: str, array: Array, value: Any) -> Array:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise RequestError(
            f"{name} must be an array (height, width, 3) or a tensor (3, height, width), without or with a batch of 1; "
            f"got {shown(value)}"
        )
    _check_size(name, *array.shape[:2])
    if array.dtype == np.bool_:
        array = array.astype(np.float32)
    elif np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32)
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise RequestError(
                f"{name} must have numbers in [0, 1], and they go from {array.min():g} to {array.max():g}; divide "
                "bytes by 255, and take x / 2 + 0.5 of what is in [-1, 1]"
            )
    elif array.dtype != np.uint8:
        raise RequestError(
            f"{name} must be of bytes (uint8) or of floating-point numbers in [0, 1], got {shown(value)}"
        )
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def _check_size(name: str, height: int, width: int) -> None:
    if not height * width:
        raise RequestError(f"{name} has no pixels: it is {width}x{height}")
    if height * width > MAX_PIXELS:
        raise RequestError(
            f"{name} is {width}x{height}, {height * width / 1e6:.0f} megapixels; up to {MAX_PIXELS / 1e6:.0f} are "
            "read. Make it smaller first"
        )


def _opaque(pixels: Array) -> Array:
    """RGB, on white where it is transparent."""
    if pixels.shape[2] == 3:
        return pixels
    colours, alpha = pixels[:, :, :3], pixels[:, :, 3:]
    if pixels.dtype != np.uint8:
        return colours * alpha + (1 - alpha)
    wide, opacity = colours.astype(np.uint16), alpha.astype(np.uint16)
    return ((wide * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def _brightness(pixels: Array) -> Array:
    """(height, width) in [0, 1]; Pillow's weights, those of ITU-R BT.601, and its rounding."""
    scale = 255 if pixels.dtype == np.uint8 else 1
    if scale == 255:
        grey = np.asarray(Image.fromarray(np.ascontiguousarray(pixels[:, :, :3])).convert("L")) / 255
    else:
        grey = pixels[:, :, :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return grey if pixels.shape[2] == 3 else grey * (pixels[:, :, 3] / scale)


def _digest(pixels: Array) -> str:
    """SHA-256, in hex, of the size and the pixels; of bytes as in `recipe.pixel_digest`."""
    kind = {np.dtype(np.uint8): "RGB", np.dtype(np.bool_): "mask"}.get(pixels.dtype, "RGB float32")
    digest = hashlib.sha256(f"{pixels.shape[1]}x{pixels.shape[0]} {kind}\n".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def _frozen(pixels: Array) -> Array:
    """A copy that nobody can change."""
    copy = np.array(pixels)
    copy.flags.writeable = False
    return copy
