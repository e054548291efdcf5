"""The sizes a random checkpoint comes in, and the JSON configs of each of its components, key for key as on the hub.

Plain data: knows no torch, writes no file, and leaves the values of weights to `weights`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Config = dict[str, Any]
DtypeName = Literal["float32", "bfloat16", "float16"]

LATENT_CHANNELS = 16
DIFFUSERS_VERSION = {"turbo": "0.36.0.dev0", "base": "0.37.0.dev0"}
"""`_diffusers_version` in the configs of the two hub repositories."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths and depths of one size; everything else is the same in all of them and as in the real models."""

    dtype: DtypeName
    """dtype that a checkpoint of this size is written in unless asked otherwise."""
    dim: int
    n_heads: int
    axes_dims: tuple[int, int, int]
    n_layers: int
    n_refiner_layers: int
    hidden_size: int
    intermediate_size: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    text_head_dim: int
    vocab_size: int
    vae_channels: tuple[int, int, int, int]
    vae_layers: int
    vae_groups: int
    shard_parameters: dict[str, int] = field(default_factory=dict)
    """Most parameters in one shard of a component; a component not named here is a single file."""


SIZES: dict[str, Size] = {
    "tiny": Size(
        dtype="float32",
        dim=64,
        n_heads=4,
        axes_dims=(4, 6, 6),
        n_layers=2,
        n_refiner_layers=2,
        hidden_size=64,
        intermediate_size=128,
        text_layers=3,
        text_heads=4,
        text_kv_heads=2,
        text_head_dim=16,
        vocab_size=768,
        vae_channels=(16, 16, 32, 32),
        vae_layers=1,
        vae_groups=8,
    ),
    "small": Size(
        dtype="float32",
        dim=768,
        n_heads=12,
        axes_dims=(16, 24, 24),
        n_layers=10,
        n_refiner_layers=2,
        hidden_size=512,
        intermediate_size=1536,
        text_layers=6,
        text_heads=8,
        text_kv_heads=4,
        text_head_dim=64,
        vocab_size=1024,
        vae_channels=(32, 64, 128, 128),
        vae_layers=2,
        vae_groups=32,
    ),
    "wide": Size(
        dtype="bfloat16",
        dim=3840,
        n_heads=30,
        axes_dims=(32, 48, 48),
        n_layers=2,
        n_refiner_layers=2,
        hidden_size=2560,
        intermediate_size=9728,
        text_layers=3,
        text_heads=32,
        text_kv_heads=8,
        text_head_dim=128,
        vocab_size=151936,
        vae_channels=(128, 256, 512, 512),
        vae_layers=2,
        vae_groups=32,
    ),
    "real": Size(
        dtype="bfloat16",
        dim=3840,
        n_heads=30,
        axes_dims=(32, 48, 48),
        n_layers=30,
        n_refiner_layers=2,
        hidden_size=2560,
        intermediate_size=9728,
        text_layers=36,
        text_heads=32,
        text_kv_heads=8,
        text_head_dim=128,
        vocab_size=151936,
        vae_channels=(128, 256, 512, 512),
        vae_layers=2,
        vae_groups=32,
        shard_parameters={"transformer": 2_500_000_000, "text_encoder": 2_000_000_000},
    ),
}


def model_index(version: str, text_encoder_class: str) -> Config:
    """`model_index.json`: the class of each component."""
    return {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": version,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", text_encoder_class],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def scheduler_config(version: str, shift: float) -> Config:
    """`scheduler/scheduler_config.json`: flow matching with a static shift."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": version,
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": shift,
    }


def transformer_config(size: Size, version: str) -> Config:
    """`transformer/config.json`."""
    return {
        "_class_name": "ZImageTransformer2DModel",
        "_diffusers_version": version,
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": list(size.axes_dims),
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": size.hidden_size,
        "dim": size.dim,
        "in_channels": LATENT_CHANNELS,
        "n_heads": size.n_heads,
        "n_kv_heads": size.n_heads,
        "n_layers": size.n_layers,
        "n_refiner_layers": size.n_refiner_layers,
        "norm_eps": 1e-05,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    }


def controlnet_config(size: Size, version: str) -> Config:
    """`config.json` of a ControlNet: 1.0, 2.0 or 2.1 of Z-Image-Turbo-Fun-Controlnet-Union."""
    sees_masks = version != "1.0"
    apart = max(1, size.n_layers // (15 if sees_masks else 6))
    kinds = {"2.0": "control_layers", "2.1": "control_noise_refiner"}
    return {
        "_class_name": "ZImageControlNetModel",
        "_diffusers_version": "0.37.0.dev0",
        "add_control_noise_refiner": kinds.get(version),
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "control_in_dim": 2 * LATENT_CHANNELS + 1 if sees_masks else LATENT_CHANNELS,
        "control_layers_places": list(range(0, size.n_layers, apart)),
        "control_refiner_layers_places": list(range(size.n_refiner_layers)) if sees_masks else [],
        "dim": size.dim,
        "n_heads": size.n_heads,
        "n_kv_heads": size.n_heads,
        "n_refiner_layers": size.n_refiner_layers,
        "norm_eps": 1e-05,
        "qk_norm": True,
    }


def text_encoder_config(size: Size, dtype: str, *, bos_token_id: int, eos_token_id: int) -> Config:
    """`text_encoder/config.json`: the language model's own, whichever class `model_index.json` names."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "head_dim": size.text_head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": 40960,
        "max_window_layers": size.text_layers,
        "model_type": "qwen3",
        "num_attention_heads": size.text_heads,
        "num_hidden_layers": size.text_layers,
        "num_key_value_heads": size.text_kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": size.vocab_size,
    }


def vae_config(size: Size, version: str) -> Config:
    """`vae/config.json`: the Flux autoencoder's."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": version,
        "act_fn": "silu",
        "block_out_channels": list(size.vae_channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(size.vae_channels),
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": LATENT_CHANNELS,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": size.vae_layers,
        "mid_block_add_attention": True,
        "norm_num_groups": size.vae_groups,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * len(size.vae_channels),
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }
