"""What the keys of a LoRA file mean: which part of which layer a tensor is, whoever trained it.

Trainers name the same layers by diffusers' names or by those that Z-Image was published with, join them by dots or by
underscores, and put words before them. So names are compared without any of that: what is left is looked up in a table
of the layers that a model has. Knows names only; no tensors, no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DOWN, UP, ALPHA, MAGNITUDE = "down", "up", "alpha", "magnitude"

_PARTS = (
    (re.compile(r"[._]lora(?:_linear_layer)?[._](?:A|down)(?:\.(?!bias$)[\w-]{1,64})??(?:\.weight)?$"), DOWN),
    (re.compile(r"[._]lora(?:_linear_layer)?[._](?:B|up)(?:\.(?!bias$)[\w-]{1,64})??(?:\.weight)?$"), UP),
    (re.compile(r"\.(?:lora_)?alpha$"), ALPHA),
    (re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.[\w-]{1,64})??(?:\.weight)?)$"), MAGNITUDE),
)
"""How the parts of a LoRA end in PEFT's and diffusers' names, kohya's, and those with dots; PEFT may have the adapter's
own name before `weight`."""
_OTHER_KINDS = (
    ("LoKr", re.compile(r"\.lokr_[wt]\d(?:_[ab])?$")),
    ("LoHa", re.compile(r"\.hada_[wt]\d(?:_[ab])?$")),
    ("LoRA-with-biases", re.compile(r"[._]lora[._](?:B|up)(?:\.[\w-]{1,64})?\.bias$")),
    ("BOFT", re.compile(r"\.boft_[RrSs](?:\.[\w-]{1,64})?$")),
    ("OFT", re.compile(r"\.(?:oft_blocks|oft_diag|oft_[Rr](?:\.[\w-]{1,64})??(?:\.weight)?)$")),
    ("IA3", re.compile(r"\.ia3_l(?:\.[\w-]{1,64})?$")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
)
_BEFORE = (
    "base_model_model_", "model_diffusion_model_", "diffusion_model_", "lora_transformer_", "transformer_",
    "lora_unet_", "lycoris_", "unet_", "default_", "module_", "model_",
)  # fmt: skip
"""What stands before a layer's name, joined by underscores."""
_TEXT_ENCODER = re.compile(r"(?:lora_te\d?_|text_encoders?[._\d]|te\d?[._]|base_model\.model\.text_encoder)")

_PUBLISHED = (
    (re.compile(r"^all_x_embedder\.2-1(?=\.|$)"), "x_embedder"),
    (re.compile(r"^all_final_layer\.2-1(?=\.)"), "final_layer"),
    (re.compile(r"(?<=\.attention\.)to_out\.0$"), "out"),
)
_QKV = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Key:
    """A key of a file: which `part` of which `modules` it is; of a fused one, three that share it in order.

    `stem` is the name without the part: what belongs together has the same.
    """

    name: str
    stem: str
    modules: tuple[str, ...]
    part: str


def layer_names(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By every name that trainers have for a layer, joined by underscores, the modules of the model that it means."""
    own = list(modules)
    names: dict[str, tuple[str, ...]] = {}
    for module in own:
        owner, _, leaf = module.rpartition(".")
        if leaf == _QKV[0]:
            names[_joined(f"{owner}.qkv")] = tuple(f"{owner}.{part}" for part in _QKV)
        if module.endswith(".to_out.0"):
            names[_joined(owner)] = (module,)
        names[_joined(published(module))] = (module,)
    return {**names, **{_joined(module): (module,) for module in own}}


def published(module: str) -> str:
    """The name of a module in the published code, as ComfyUI has it; queries, keys and values keep their own."""
    for pattern, name in _PUBLISHED:
        module = pattern.sub(name, module)
    return module


def read_key(name: str, layers: Mapping[str, tuple[str, ...]]) -> Key | None:
    """What a key means among `layers` (of `layer_names`), `None` if it is of no layer, or no part of a LoRA."""
    for pattern, part in _PARTS:
        found = pattern.search(name)
        if found is not None:
            stem = name[: found.start()]
            modules = _modules(_joined(stem), layers)
            return None if modules is None else Key(name, stem, modules, part)
    return None


def other_kind(name: str) -> str | None:
    """What kind of adapter a key is of, where it is none of those that are read."""
    return next((kind for kind, pattern in _OTHER_KINDS if pattern.search(name)), None)


def is_of_text_encoder(name: str) -> bool:
    """Whether a key is of a text encoder, which no adapter is attached to."""
    return _TEXT_ENCODER.match(name) is not None


def _modules(joined: str, layers: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    while joined not in layers:
        word = next((word for word in _BEFORE if joined.startswith(word)), None)
        if word is None:
            return None
        joined = joined.removeprefix(word)
    return layers[joined]


def _joined(name: str) -> str:
    return re.sub(r"[.-]", "_", name)
