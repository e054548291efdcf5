"""Writes weights as others' tools do: published names, llama.cpp's, latent diffusion's, GGUF by the `gguf` package,
and 8-bit floats with scales."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from torch import Tensor

from zimage.memory.sizes import GGML_BLOCKS
from zimage.models import ggml

PUBLISHED = (
    ("all_final_layer.2-1.", "final_layer."), ("all_x_embedder.2-1.", "x_embedder."), (".norm_q.", ".q_norm."),
    (".norm_k.", ".k_norm."), (".to_out.0.", ".out."),
)  # fmt: skip
LLAMA = (
    ("embed_tokens", "token_embd"), ("layers.", "blk."), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
)  # fmt: skip

Weights = Mapping[str, Tensor]


def weights_of(folder: Path, component: str = "transformer") -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted((folder / component).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def published(weights: Weights, prefix: str = "") -> dict[str, Tensor]:
    """With the official names: queries, keys and values are one matrix."""
    named = {}
    for name, tensor in weights.items():
        if re.search(r"\.to_[kv]\.", name):
            continue
        if ".to_q." in name:
            tensor = torch.cat([weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
            name = name.replace(".to_q.", ".qkv.")
        for own, other in PUBLISHED:
            name = name.replace(own, other)
        named[prefix + name] = tensor.clone()
    return named


def write_gguf(
    path: Path, tensors: Weights, kind_of: Callable[[str], str] = lambda name: "F32", architecture: str = "lumina2"
) -> Path:
    """Matrices are stored as `kind_of` their names, if their rows are whole blocks of that; all else in float32."""
    writer = GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        kind, values = kind_of(name), tensor.float().numpy()
        if kind in GGML_BLOCKS and values.ndim == 2 and not values.shape[1] % GGML_BLOCKS[kind][0]:
            writer.add_tensor(name, packed(values, kind), raw_dtype=GGMLQuantizationType[kind])
        else:
            writer.add_tensor(name, values.astype(np.float16) if kind == "F16" else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(values: npt.NDArray[np.float32], kind: str) -> npt.NDArray[np.uint8]:
    """As the `gguf` package rounds them; of kinds that it only reads, random blocks of small numbers."""
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        return quantize(values, GGMLQuantizationType[kind])
    content = np.random.default_rng(len(values)).integers(
        0, 256, (len(values), ggml.packed_bytes(kind, values.shape[1])), dtype=np.uint8
    )
    blocks = content.reshape(-1, GGML_BLOCKS[kind][1])
    for place in ggml.KINDS[kind].halves:
        blocks[:, place : place + 2] = np.array([1e-5], dtype=np.float16).view(np.uint8)
    return content


def llama(weights: Weights) -> dict[str, Tensor]:
    """A text encoder with llama.cpp's names, which has no prefix."""
    named = {}
    for name, tensor in weights.items():
        name = name.removeprefix("model.")
        name = "output_norm.weight" if name == "norm.weight" else name
        for own, other in LLAMA:
            name = name.replace(own, other)
        named[name] = tensor
    return named


def ldm(weights: Weights, prefix: str = "") -> dict[str, Tensor]:
    """A VAE with the names that latent diffusion gives, its attention as convolutions."""
    named = {}
    for name, tensor in weights.items():
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", name)
        name = name.replace("down_blocks.", "down.")
        name = re.sub(r"(\.\d)\.resnets", r"\1.block", name)
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        name = (
            name.replace("mid_block.attentions.0", "mid.attn_1")
            .replace("group_norm", "norm")
            .replace("to_out.0", "proj_out")
        )
        name = re.sub(r"attn_1\.to_([qkv])", r"attn_1.\1", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        named[prefix + name] = tensor.contiguous()
    return named


def float8(
    weights: Weights,
    pick: Callable[[str], bool],
    scale: str | None = "scale_weight",
    rows: bool = False,
    kind: torch.dtype = torch.float8_e4m3fn,
) -> dict[str, Tensor]:
    """Matrices that `pick` picks in 8-bit floats, each with its `scale` of that name: one number, or one for each of
    the `rows`; without one as they are."""
    named = {}
    for name, tensor in weights.items():
        if not pick(name) or tensor.ndim != 2:
            named[name] = tensor
            continue
        largest = tensor.float().abs().amax(dim=1, keepdim=True) if rows else tensor.float().abs().max()
        factor = largest / torch.finfo(kind).max if scale else torch.tensor(1.0)
        named[name] = (tensor.float() / factor).to(kind)
        if scale:
            named[f"{name.removesuffix('weight')}{scale}"] = factor
    return named


def widened(weights: Weights) -> dict[str, Tensor]:
    """What such weights mean, in float32, by torch's own conversion."""
    scales = {
        name.rpartition(".")[0]: one for name, one in weights.items() if name.endswith(("scale_weight", "weight_scale"))
    }
    return {
        name: tensor.float() * scales.get(name.removesuffix(".weight"), torch.tensor(1.0))
        for name, tensor in weights.items()
        if not name.endswith(("scale_weight", "weight_scale", "comfy_quant", "input_scale", "scaled_fp8"))
    }
