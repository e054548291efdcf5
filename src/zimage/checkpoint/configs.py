"""The JSON configs of a checkpoint, read against tables of what a Z-Image model may say.

`model_index.json` must name the five known classes, and each config only what zimage understands: nothing in a file
chooses a class, a kernel or a size beyond the tables. Knows no weights and no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..own import KEYS, OwnRecipe
from ..rules import SAMPLERS
from .fields import Field, exactly, flag, integer, integers, number, read_config, read_fields, refuse
from .reading import shown

MODEL_INDEX = Path("model_index.json")
SCHEDULER = Path("scheduler", "scheduler_config.json")
PARTS = ("text_encoder", "transformer", "vae")
"""The components that have weights; each has a `config.json` in the folder of its name."""

TEMPLATE_FILE = "chat_template.jinja"
LEGACY_TOKENIZER_FILES = ("added_tokens.json", "special_tokens_map.json")
"""What `tokenizer.json` took the place of."""
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt")
"""The tokenizer's files on the hub; with the ones above, all that are ever read."""

CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "scheduler": ("diffusers", ("FlowMatchEulerDiscreteScheduler",)),
    "text_encoder": ("transformers", ("Qwen3Model", "Qwen3ForCausalLM")),
    "tokenizer": ("transformers", ("Qwen2Tokenizer", "Qwen2TokenizerFast")),
    "transformer": ("diffusers", ("ZImageTransformer2DModel", "ZImageTransformer")),
    "vae": ("diffusers", ("AutoencoderKL",)),
}
"""Library and class names that `model_index.json` may give each component; zimage uses its own whichever it is."""

_LATENT_CHANNELS = integer(1, 1024)

_SCHEDULER_FIELDS: dict[str, Field] = {
    "shift": number(0, 1e4),
    KEYS["sampler"]: exactly(*SAMPLERS, default=None),
    KEYS["guidance_scale"]: Field(
        lambda value: type(value) in (int, float) and 0 <= value <= sys.float_info.max, "a number from 0 up", None
    ),
    "num_train_timesteps": exactly(1000, default=1000),
    "use_dynamic_shifting": exactly(False, default=False),
    "use_karras_sigmas": exactly(False, None, default=False),
    "use_exponential_sigmas": exactly(False, None, default=False),
    "use_beta_sigmas": exactly(False, None, default=False),
    "invert_sigmas": exactly(False, default=False),
    "shift_terminal": exactly(None, default=None),
    "stochastic_sampling": exactly(False, default=False),
    "base_shift": number(-1e4, 1e4, 0.5, optional=True),
    "max_shift": number(-1e4, 1e4, 1.15, optional=True),
    "base_image_seq_len": integer(1, 1 << 20, 256),
    "max_image_seq_len": integer(1, 1 << 20, 4096),
    "time_shift_type": exactly("exponential", "linear", default="exponential"),
}

_TRANSFORMER_FIELDS: dict[str, Field] = {
    "all_patch_size": integers(1, 2, 2, [2]),
    "all_f_patch_size": integers(1, 1, 1, [1]),
    "in_channels": _LATENT_CHANNELS,
    "dim": integer(1, 65536),
    "n_layers": integer(1, 256),
    "n_refiner_layers": integer(0, 256),
    "n_heads": integer(1, 4096),
    "n_kv_heads": integer(1, 4096),
    "norm_eps": number(0, 1, 1e-5),
    "qk_norm": flag(True),
    "cap_feat_dim": integer(1, 65536),
    "siglip_feat_dim": exactly(None, default=None),
    "rope_theta": number(0, 1e12, 256.0),
    "t_scale": number(0, 1e6, 1000.0),
    "axes_dims": integers(3, 2, 65536, step=2),
    "axes_lens": integers(3, 1, 65536),
}

_TEXT_ENCODER_FIELDS: dict[str, Field] = {
    "model_type": exactly("qwen3"),
    "vocab_size": integer(1, 1 << 20),
    "hidden_size": integer(1, 65536),
    "intermediate_size": integer(1, 262144),
    "num_hidden_layers": integer(2, 256),
    "num_attention_heads": integer(1, 4096),
    "num_key_value_heads": integer(1, 4096),
    "head_dim": integer(2, 65536, 128),
    "hidden_act": exactly("silu", default="silu"),
    "max_position_embeddings": integer(512, 1 << 24, 32768),
    "rms_norm_eps": number(0, 1, 1e-6),
    "rope_theta": number(0, 1e12, None, optional=True),
    "rope_parameters": Field(lambda value: value is None or isinstance(value, dict), "an object or null", None),
    "rope_scaling": Field(lambda value: value is None or isinstance(value, dict), "an object or null", None),
    "attention_bias": flag(False),
    "tie_word_embeddings": flag(False),
    "use_sliding_window": exactly(False, default=False),
    "quantization_config": exactly(None, default=None),
    "layer_types": Field(
        lambda value: value is None or (isinstance(value, list) and all(kind == "full_attention" for kind in value)),
        "a list of 'full_attention' or null",
        None,
    ),
}

_VAE_FIELDS: dict[str, Field] = {
    "in_channels": exactly(3, default=3),
    "out_channels": exactly(3, default=3),
    "down_block_types": exactly(["DownEncoderBlock2D"] * 4),
    "up_block_types": exactly(["UpDecoderBlock2D"] * 4),
    "block_out_channels": integers(4, 1, 8192),
    "layers_per_block": integer(1, 64),
    "act_fn": exactly("silu", default="silu"),
    "latent_channels": _LATENT_CHANNELS,
    "norm_num_groups": integer(1, 8192, 32),
    "sample_size": integer(8, 65536, 1024),
    "scaling_factor": number(0, 1e4),
    "shift_factor": number(-1e4, 1e4, None, optional=True),
    "latents_mean": exactly(None, default=None),
    "latents_std": exactly(None, default=None),
    "force_upcast": flag(True),
    "use_quant_conv": flag(True),
    "use_post_quant_conv": flag(True),
    "mid_block_add_attention": flag(True),
}


@dataclass
class Problems:
    """Collects `CheckpointError`s, so that a check that fails does not keep the next one from being made."""

    errors: list[CheckpointError] = field(default_factory=list)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Takes up a `CheckpointError` raised inside."""
        try:
            yield
        except CheckpointError as error:
            self.errors.append(error)


@dataclass(frozen=True, kw_only=True)
class Configs:
    """What the configs say, each as keyword arguments for the class it describes; None where it could not be read."""

    classes: dict[str, str] | None
    shift: float | None
    own: OwnRecipe
    """What the scheduler's config names."""
    transformer: dict[str, Any] | None
    text_encoder: dict[str, Any] | None
    vae: dict[str, Any] | None


def read_configs(folder: Path, problems: Problems) -> Configs:
    """Read all configs of the checkpoint in `folder`; what is wrong with them goes to `problems`."""
    classes = shift = transformer = text_encoder = vae = None
    own = OwnRecipe()
    with problems.collected():
        classes = read_model_index(folder)
    with problems.collected():
        shift, own = read_schedule(folder)
    with problems.collected():
        transformer = read_transformer(folder / "transformer" / "config.json")
    with problems.collected():
        text_encoder = read_text_encoder(folder / "text_encoder" / "config.json")
    with problems.collected():
        vae = read_vae(folder / "vae" / "config.json")
    if transformer and text_encoder:
        with problems.collected():
            _agree(folder, "cap_feat_dim", transformer, "text_encoder", "hidden_size", text_encoder)
    if transformer and vae:
        with problems.collected():
            _agree(folder, "in_channels", transformer, "vae", "latent_channels", vae)
    return Configs(classes=classes, shift=shift, own=own, transformer=transformer, text_encoder=text_encoder, vae=vae)


def read_model_index(folder: Path) -> dict[str, str]:
    """The class names that `model_index.json` gives to the five components; any other class is refused."""
    path = folder / MODEL_INDEX
    index = read_config(path)
    problems = []
    if index.get("_class_name") != "ZImagePipeline":
        problems.append(f"_class_name must be 'ZImagePipeline', got {shown(index.get('_class_name'))}")
    for name, (library, known) in CLASSES.items():
        if index.get(name) not in [[library, one] for one in known]:
            wanted = " or ".join(f"{library}.{one}" for one in known)
            problems.append(f"{name} must be {wanted}, got {shown(index.get(name))}")
    unknown = sorted(key for key in index if key not in CLASSES and not key.startswith("_"))
    problems += [f"unknown component {shown(key)}: {shown(index[key])}" for key in unknown[:5]]
    if problems:
        raise CheckpointError(f"{path} does not describe a Z-Image model: {'; '.join(problems)}")
    return {name: index[name][1] for name in CLASSES}


def read_schedule(folder: Path) -> tuple[float, OwnRecipe]:
    """The static shift of the schedule, and what is named beside it of the model's own recipe; a scheduler that would
    make other sigmas than zimage does is refused."""
    path = folder / SCHEDULER
    fields = _with_class(_SCHEDULER_FIELDS, "scheduler")
    read = read_fields(path, fields, others="refuse")
    return float(read["shift"]), OwnRecipe(**{name: read[key] for name, key in KEYS.items()})


def read_transformer(path: Path) -> dict[str, Any]:
    """Arguments for `ZImageTransformer`."""
    config = read_fields(path, _with_class(_TRANSFORMER_FIELDS, "transformer"), others="refuse")
    del config["_class_name"]
    problems = []
    if config["n_kv_heads"] != config["n_heads"]:
        problems.append(f"n_kv_heads must be n_heads ({config['n_heads']}), got {config['n_kv_heads']}")
    if sum(config["axes_dims"]) * config["n_heads"] != config["dim"]:
        head = f"dim / n_heads ({config['dim']} / {config['n_heads']})"
        problems.append(f"axes_dims must add up to {head}, got {config['axes_dims']}")
    refuse(path, problems)
    return config


def read_text_encoder(path: Path) -> dict[str, Any]:
    """Arguments for `Qwen3Config`, those of the architecture only; `num_hidden_layers` is that of the whole model."""
    config = read_fields(path, _TEXT_ENCODER_FIELDS, others="drop")
    problems = []
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        problems.append(
            f"num_attention_heads ({config['num_attention_heads']}) must be a multiple of num_key_value_heads, "
            f"got {config['num_key_value_heads']}"
        )
    if config["head_dim"] % 2:
        problems.append(f"head_dim must be even, got {config['head_dim']}")
    theta = _rope_theta(config, problems)
    refuse(path, problems)
    for key in ("model_type", "quantization_config", "layer_types", "rope_theta", "rope_scaling"):
        del config[key]
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def read_vae(path: Path) -> dict[str, Any]:
    """Arguments for `AutoencoderKL`."""
    config = read_fields(path, _with_class(_VAE_FIELDS, "vae"), others="refuse")
    del config["_class_name"]
    uneven = [width for width in config["block_out_channels"] if width % config["norm_num_groups"]]
    if uneven:
        groups = config["norm_num_groups"]
        refuse(path, [f"block_out_channels must be multiples of norm_num_groups ({groups}), got {uneven[0]}"])
    return config


def _rope_theta(config: dict[str, Any], problems: list[str]) -> float | None:
    """The one base of the plain rotary embedding, from the old place or the new one."""
    thetas = {config["rope_theta"]} - {None}
    for key in ("rope_parameters", "rope_scaling"):
        rope = dict(config[key] or {})
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        theta = rope.pop("rope_theta", None)
        rope.pop("type", None)
        if kind != "default" or rope:
            problems.append(f"{key} must be of type 'default', got {shown(config[key])}")
        elif theta is not None and not number(0, 1e12).accepts(theta):
            problems.append(f"{key}.rope_theta must be a number between 0 and 1e12, got {shown(theta)}")
        elif theta is not None:
            thetas.add(theta)
    if len(thetas) != 1 and not problems:
        problems.append("rope_theta is missing" if not thetas else f"rope_theta is given twice: {sorted(thetas)}")
    return float(thetas.pop()) if len(thetas) == 1 else None


def _with_class(fields: dict[str, Field], component: str) -> dict[str, Field]:
    known = CLASSES[component][1]
    return {"_class_name": exactly(*known, default=known[0])} | fields


def _agree(
    folder: Path, key: str, transformer: dict[str, Any], other: str, other_key: str, config: dict[str, Any]
) -> None:
    if transformer[key] != config[other_key]:
        raise CheckpointError(
            f"{folder / 'transformer' / 'config.json'}: {key} must be the {other}'s {other_key} ({config[other_key]}), "
            f"got {transformer[key]}; the two are from different models"
        )
