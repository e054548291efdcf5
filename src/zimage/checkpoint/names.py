"""What tensors are called by others: Z-Image's authors and ComfyUI, llama.cpp, and the code that the VAE came from.

Pairs of parts of names, ours (those of diffusers and transformers) and the other's, each from dot to dot. Knows names
and shapes; no files, no values, no torch.
"""

from __future__ import annotations

Pairs = tuple[tuple[str, str], ...]
Shape = tuple[int, ...]

_TRANSFORMER: Pairs = (
    (".all_final_layer.2-1.", ".final_layer."),
    (".all_x_embedder.2-1.", ".x_embedder."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
    (".attention.to_out.0.", ".attention.out."),
)
"""Those that Z-Image was published with, which ComfyUI and most GGUF files use."""

_TEXT_ENCODER: Pairs = (
    (".layers.", ".blk."),
    (".embed_tokens.", ".token_embd."),
    (".norm.", ".output_norm."),
    (".lm_head.", ".output."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    *((f".self_attn.{name}_proj.", f".attn_{name}.") for name in "qkv"),
    (".self_attn.o_proj.", ".attn_output."),
    (".self_attn.q_norm.", ".attn_q_norm."),
    (".self_attn.k_norm.", ".attn_k_norm."),
    *((f".mlp.{name}_proj.", f".ffn_{name}.") for name in ("gate", "up", "down")),
)
"""Those of llama.cpp, whose rows of Qwen3's queries and keys are in the order of the original."""

_LEVELS = 4
_ATTENTION = ".mid_block.attentions.0."
_VAE: Pairs = (
    *((f".encoder.down_blocks.{level}.resnets.", f".encoder.down.{level}.block.") for level in range(_LEVELS)),
    *((f".encoder.down_blocks.{level}.downsamplers.0.", f".encoder.down.{level}.downsample.")
      for level in range(_LEVELS)),
    *((f".decoder.up_blocks.{_LEVELS - 1 - level}.resnets.", f".decoder.up.{level}.block.")
      for level in range(_LEVELS)),
    *((f".decoder.up_blocks.{_LEVELS - 1 - level}.upsamplers.0.", f".decoder.up.{level}.upsample.")
      for level in range(_LEVELS)),
    *((f".mid_block.resnets.{number}.", f".mid.block_{number + 1}.") for number in range(2)),
    (f"{_ATTENTION}group_norm.", ".mid.attn_1.norm."),
    *((f"{_ATTENTION}to_{name}.", f".mid.attn_1.{name}.") for name in "qkv"),
    (f"{_ATTENTION}to_out.0.", ".mid.attn_1.proj_out."),
    *((f".{part}.conv_norm_out.", f".{part}.norm_out.") for part in ("encoder", "decoder")),
    (".conv_shortcut.", ".nin_shortcut."),
)  # fmt: skip
"""Those of latent diffusion, which counts the decoder's levels from the finest; Flux's `ae.safetensors` has them."""

_PAIRS = {"transformer": _TRANSFORMER, "text_encoder": _TEXT_ENCODER, "vae": _VAE}

_PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "text_encoder": ("text_encoders.qwen3_4b.", "transformer.", "model."),
    "vae": ("first_stage_model.", "vae."),
}
"""What may stand before all names of a component, in this order."""
_ELSEWHERE = {
    "transformer": ("text_encoders.", "first_stage_model.", "vae."),
    "text_encoder": ("model.diffusion_model.", "first_stage_model.", "vae."),
    "vae": ("model.diffusion_model.", "text_encoders."),
}
"""How the names of the other components begin in a file that holds several."""
_UNREAD = {"transformer": ("norm_final.weight",), "text_encoder": ("logit_scale",), "vae": ()}
"""In files that others wrote, and of no use."""


def bare_name(component: str, name: str) -> str | None:
    """A tensor's name in a file without what stands before it there; None for one of another component or of no use."""
    if name.startswith(_ELSEWHERE[component]):
        return None
    for prefix in _PREFIXES[component]:
        name = name.removeprefix(prefix)
    return None if name in _UNREAD[component] else name


def own_name(component: str, name: str) -> str:
    """Our name for a tensor that others call `name`; one that is ours already stays."""
    return _renamed(name, [(other, own) for own, other in _PAIRS[component]])


def other_name(component: str, name: str) -> str:
    """The name that ComfyUI has for a tensor that we call `name`; its text encoders have ours after "model."."""
    return f"model.{name}" if component == "text_encoder" else _renamed(name, _PAIRS[component])


def is_pointwise(name: str) -> bool:
    """Whether `name`, ours, is a matrix of the VAE that others store as a convolution of one pixel."""
    return _ATTENTION in f".{name}" and name.endswith(".weight") and "group_norm" not in name


def _renamed(name: str, pairs: Pairs | list[tuple[str, str]]) -> str:
    dotted = f".{name}"
    for old, new in pairs:
        dotted = dotted.replace(old, new)
    return dotted[1:]
