"""The recipe of a picture: all that is needed to make it again, as data and as JSON.

Reads recipes that came from anywhere: whatever a text holds, the outcome is a valid `Recipe` or a `RequestError`.
Knows nothing of files or of loaded models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NoReturn

from ..editing import SourceImage
from ..errors import RequestError
from ..hires import OPTIONS, Hires
from ..request import ResolvedRequest
from ..rules import Limits, integer, is_unicode, shown
from ..variants import get_variant
from .relayed import check_relay, turbo_document

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1
"""Version of the JSON; counted up whenever a reader of the previous one would misread it."""
MAX_CHARACTERS = 2**20
"""Longest JSON that is read: a prompt of 1504 tokens, the released models' most, and 1000 sigmas need under a tenth."""
FILE_KEYS = ("transformer", "text_encoder", "vae")
MODEL_KEYS = ("source", "revision", "variant", "fingerprint", *FILE_KEYS)
IMAGE_NAMES = ("image", "mask_image", "control_image")
_IMAGE_KEYS = ("width", "height", "sha256")
ADAPTER_KEYS = ("source", "digest")
TENSOR_NAMES = ("latents", "prompt_embeds", "negative_prompt_embeds")
_PARTS = ("format", "request", "given", "model", "runtime", "pixels")
_FILES = ("adapters", "controlnet")
_OPTIONAL = (*_FILES, "relay")
LIMITS = Limits(max_side=2**20, max_sequence_length=2**16)
"""No checkpoint that is read takes more; whoever follows a recipe resolves it again, with the limits of its model."""
_MAX_TEXT, _MAX_ENTRIES = 4096, 64
_MAX_SHIFT = 1000.0
MAX_IMAGE_SIDE = 2**26
"""Pixels; more than any image has that is read."""


@dataclass(frozen=True)
class Recipe:
    """What one picture was made from, with what, and a digest of its pixels to tell whether it came out the same.

    Args:
        request: the request, resolved. Tensors in it are not kept: their names go to `given`. Of image and mask it
            has size and digest.
        model: `source` (hub id or folder), `revision`, `variant` and `fingerprint` of the weights, and `transformer`,
            `text_encoder` and `vae`, the file that each came from if not from there; "" is unknown, or there is none.
        runtime: versions and settings that bits may depend on, as texts: `zimage`, `torch`, `dtype`, `device`...
        pixels: `pixel_digest` of the picture.
        given: names of tensors that the request had in place of texts or noise, or that a callback changed.
        adapters: of each adapter of the request by name, its `source` (hub id or file) and the `digest` of its file.
        controlnet: the same of the ControlNet, where the request has a control image; else it is empty.
        handover, turbo: of a relay's picture, the noise level at which Turbo took over from the base model, whose all
            the above is, and Turbo's own recipe of the same picture.
    """

    request: ResolvedRequest
    model: Mapping[str, str]
    runtime: Mapping[str, str]
    pixels: str
    given: tuple[str, ...] = ()
    adapters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    controlnet: Mapping[str, str] = field(default_factory=dict)
    handover: float = 0.0
    turbo: Recipe | None = None

    def __post_init__(self) -> None:
        given = tuple(name for name in TENSOR_NAMES if name in self.request.tensors or name in self.given)
        known: dict[str, Any] = {name: one and replace(one, pixels=None) for name, one in _images(self.request).items()}
        for name, value in {
            "request": replace(self.request, tensors={}, **known),
            "model": {**dict.fromkeys(FILE_KEYS, ""), **_texts("model", self.model)},
            "runtime": _texts("runtime", self.runtime),
            "given": given,
            "adapters": _adapters(self.adapters, self.request),
            "controlnet": _texts("controlnet", self.controlnet),
        }.items():
            object.__setattr__(self, name, value)
        _exact_keys("model", self.model, MODEL_KEYS)
        _exact_keys("controlnet", self.controlnet, ADAPTER_KEYS if self.request.control_image else ())
        if self.model["variant"] not in ("", self.request.variant):
            raise RequestError(f"the recipe is for {self.request.variant}, but its model is {self.model['variant']}")
        _digest("the recipe's pixels", self.pixels)
        object.__setattr__(self, "handover", check_relay(self))

    @property
    def replayable(self) -> bool:
        """Whether the recipe alone is enough: no tensors or images were given that it does not contain."""
        return not self.given and self.request.image is None and self.request.control_image is None

    def require_whole(self) -> None:
        """Raises `RequestError` where the picture was made from tensors, which no recipe holds."""
        if self.given:
            raise RequestError(
                f"the picture was made from tensors that its recipe does not hold ({', '.join(self.given)}), given to "
                "the call or changed by its callback; call the pipeline with them again"
            )

    def with_images(
        self,
        image: SourceImage | None = None,
        mask_image: SourceImage | None = None,
        control_image: SourceImage | None = None,
    ) -> ResolvedRequest:
        """The request, with the images that it needs; raises `RequestError` for one that is not given, not needed, or
        not the one that the recipe names."""
        found: dict[str, Any] = dict(zip(IMAGE_NAMES, (image, mask_image, control_image), strict=True))
        for name, known in _images(self.request).items():
            came = found[name]
            if known is None and came is not None:
                raise RequestError(f"the picture was made without {name}; leave it out")
            if known is not None and came is None:
                raise RequestError(
                    f"the picture was made from {name} ({known.width}x{known.height}), of which its recipe has only a "
                    f"digest; pass {name}"
                )
            if known is not None and known != came:
                raise RequestError(
                    f"this {name} is not the one that the picture was made from: its pixels have another digest, "
                    f"{came and came.digest[:12]}... and not {known.digest[:12]}..."
                )
        return replace(self.request, **found)

    def to_json(self) -> str:
        """The recipe as one line of JSON, which `from_json` reads back to an equal recipe."""
        values = {name: _plain(getattr(self.request, name)) for name in _request_types()}
        request = {name: value for name, value in values.items() if _LATER.get(name, MISSING) != value}
        model = {name: text for name, text in self.model.items() if text or name not in _LATER_FILES}
        contents = (FORMAT, request, self.given, model, self.runtime, self.pixels)
        document = dict(zip(_PARTS, contents, strict=True))
        document |= {name: getattr(self, name) for name in _FILES if getattr(self, name)}
        if self.turbo is not None:
            document["relay"] = {"handover": self.handover, "turbo": json.loads(self.turbo.to_json())}
        text = json.dumps(document, ensure_ascii=False, allow_nan=False)
        return text if is_unicode(text) else json.dumps(document, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read a recipe that may come from anyone; raises `RequestError`, and nothing else, if it is not valid."""
        return cls._read(_parse(text))

    @classmethod
    def _read(cls, document: Mapping[str, Any]) -> Recipe:
        version = document.get("format")
        if type(version) is not int or version < 1:
            raise RequestError("this is not a zimage recipe: it has no format number")
        if version != FORMAT:
            raise RequestError(f"the recipe has format {shown(version)}, this zimage reads format {FORMAT}; update it")
        _exact_keys("recipe", document, (*_PARTS, *_OPTIONAL), optional=_OPTIONAL)
        given, handover, turbo = document["given"], 0.0, None
        if "relay" in document:
            turbo = cls._read(turbo_document(document["relay"]))
            handover = document["relay"]["handover"]
        if not isinstance(given, list) or any(name not in TENSOR_NAMES for name in given):
            raise RequestError(f"the recipe's given must list names of tensors, got {shown(given)}")
        try:
            request = _read_request(document["request"])
            model, runtime, pixels = (document[part] for part in ("model", "runtime", "pixels"))
            adapters, controlnet = (document.get(name, {}) for name in _FILES)
            return cls(request, model, runtime, pixels, tuple(given), adapters, controlnet, handover, turbo)
        except RequestError as error:
            raise RequestError(f"the recipe is not valid: {str(error)[:300]}") from None


def pixel_digest(image: Image) -> str:
    """SHA-256, in hex, of an image's size and its RGB bytes: equal where and only where the pictures are."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height} RGB\n".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def differences(recipe: Recipe, other_model: Mapping[str, str], other_runtime: Mapping[str, str]) -> list[str]:
    """What differs between a recipe's model and runtime and others, in plain sentences; what is unknown does not.

    Weights with equal fingerprints are the same wherever they lie, so then source and revision are not compared.
    """
    sentences = []
    fingerprint = recipe.model["fingerprint"]
    same_weights = bool(fingerprint) and fingerprint == other_model.get("fingerprint")
    for key in MODEL_KEYS:
        was, now = recipe.model[key], other_model.get(key, "")
        if was and now and was != now and not (same_weights and key in ("source", "revision", *FILE_KEYS)):
            sentences.append(f"model {key} was {_printable(was)}, here it is {_printable(now)}")
    for key, was in recipe.runtime.items():
        now = other_runtime.get(key, "")
        if was and was != now:
            sentences.append(f"{_printable(key)} was {_printable(was)}, here it is {_printable(now) or 'unknown'}")
    return sentences


def _parse(text: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise RequestError(f"a recipe must be a text, got {shown(text)}")
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"the recipe is {len(text)} characters long; at most {MAX_CHARACTERS} are read")

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the recipe is not valid JSON: {reason}") from None
    if not isinstance(document, dict):
        raise RequestError(f"a recipe must be a JSON object, got {shown(document)}")
    return document


def _request_types() -> dict[str, str]:
    """The fields of a request that a recipe holds, each with its annotation."""
    return {field.name: str(field.type) for field in fields(ResolvedRequest) if field.name != "tensors"}


_LATER = {
    field.name: field.default
    for field in fields(ResolvedRequest)
    if field.default is not MISSING and field.name in _request_types()
}
"""Options that recipes did not always have, with what stands for their absence; a recipe names them where they act."""
_LATER_FILES = ("text_encoder", "vae")
"""The same of files."""
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "tuple[float, ...]": (list,),
    "tuple[int, ...]": (list,),
    "bool": (bool,),
    "SourceImage | None": (dict,),
    "Hires | None": (dict,),
    "tuple[tuple[str, float], ...]": (list,),
}


def _read_request(document: Any) -> ResolvedRequest:
    """The request in a recipe's JSON, put through every rule that a user's request goes through."""
    types = _request_types()
    _exact_keys("request", document, tuple(types), optional=tuple(_LATER))
    for name, value in document.items():
        if type(value) not in _JSON_TYPES[types[name]]:
            raise RequestError(f"{name} is of the wrong type: {shown(value)}")
        if isinstance(value, str) and not is_unicode(value):
            raise RequestError(f"{name} has characters that are not Unicode")
    shift = document["shift"]
    if not 0 < shift <= _MAX_SHIFT:
        raise RequestError(f"shift must be a number above 0 and up to {_MAX_SHIFT:g}, got {shown(shift)}")
    images = {name: _read_image(name, document[name]) for name in IMAGE_NAMES if name in document}
    pairs = document.get("adapters", [])
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise RequestError(f"adapters must be pairs of a name and a strength, got {shown(pairs)}")
    adapters = tuple((name, value) for name, value in pairs)
    known = {**document, **images, "shift": float(shift), "adapters": adapters}
    if "hires" in document:
        _exact_keys("hires", document["hires"], OPTIONS)
        known["hires"] = Hires(**document["hires"])
    request = ResolvedRequest(**known)
    return request.resolve(get_variant(request.variant), shift=request.shift, limits=LIMITS)


def _images(request: ResolvedRequest) -> dict[str, SourceImage | None]:
    return {name: getattr(request, name) for name in IMAGE_NAMES}


def _plain(value: Any) -> Any:
    """A value of a request as JSON has it."""
    if isinstance(value, SourceImage):
        return dict(zip(_IMAGE_KEYS, (value.width, value.height, value.digest), strict=True))
    return value.options if isinstance(value, Hires) else value


def _read_image(name: str, document: Mapping[str, Any]) -> SourceImage:
    _exact_keys(name, document, _IMAGE_KEYS)
    width, height = (integer(f"{key} of {name}", document[key], 1, MAX_IMAGE_SIDE) for key in ("width", "height"))
    return SourceImage(width, height, _digest(f"sha256 of {name}", document["sha256"]))


def _digest(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise RequestError(f"{name} must be 64 hexadecimal digits, got {shown(value)}")
    return value


def _adapters(adapters: Any, request: ResolvedRequest) -> dict[str, dict[str, str]]:
    """A plain copy of what a recipe says of the adapters of its request, no more and no fewer."""
    _exact_keys("adapters", adapters, tuple(name for name, _ in request.adapters))
    described = {name: _texts(f"the adapter {name}", texts) for name, texts in adapters.items()}
    for name, texts in described.items():
        _exact_keys(f"the adapter {name}", texts, ADAPTER_KEYS)
    return described


def _exact_keys(name: str, document: Any, expected: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(document, Mapping):
        raise RequestError(f"{name} must be an object, got {shown(document)}")
    missing = [key for key in expected if key not in document and key not in optional]
    unknown = [key for key in document if key not in expected]
    for problem, keys in (("lacks", missing), ("has unknown entries", unknown)):
        if keys:
            raise RequestError(f"{name} {problem}: {_printable(', '.join(map(str, keys)))[:200]}")


def _texts(name: str, values: Any) -> dict[str, str]:
    """A plain copy of a mapping of texts to texts, of a sane size."""
    if not isinstance(values, Mapping) or len(values) > _MAX_ENTRIES:
        raise RequestError(f"{name} must be an object of at most {_MAX_ENTRIES} texts, got {shown(values)}")
    for text in (*values.keys(), *values.values()):
        if not isinstance(text, str) or len(text) > _MAX_TEXT:
            raise RequestError(f"{name} must hold texts of at most {_MAX_TEXT} characters, got {shown(text)}")
    return dict(values)


def _printable(text: str) -> str:
    """The text, or its escaped form where it would steer a terminal."""
    return text if text.isprintable() else repr(text)
