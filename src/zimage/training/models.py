"""The two networks that are trained together, text encoder and transformer, and the pipeline that they become.

Built with the real classes in a small size and started so that they learn from the first step. Knows no data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3Config, Qwen3Model

from ..models.precision import cast, choose_dtype
from ..models.transformer import PATCH, ZImageTransformer
from ..pipeline import ZImagePipeline
from ..variants import TURBO, get_variant
from .alignment import Reader
from .config import BASE_GUIDANCE, LATENT_CHANNELS, TURBO_SAMPLER, ModelSize
from .state import fill
from .tokenizer import load_tokenizer


class Painter(nn.Module):
    """A text encoder, the transformer that listens to it, and what reads from the transformer's middle layer."""

    def __init__(self, size: ModelSize) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(size)
        self.transformer = build_transformer(size)
        self.reader = Reader(size.dim)

    def velocity_and_facts(
        self, latents: Tensor, ids: Tensor, lengths: Sequence[int], times: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Noise less image at `latents` (B, C, H, W), for captions `ids` (B, padded) and model times (B,).

        With it comes what is read of each patch, as `alignment.patch_facts` has it.
        """
        features = self.text_encoder(input_ids=ids, use_cache=False).last_hidden_state  # (B, padded, hidden)
        layers = self.transformer.layers
        with outputs_of(self.transformer, layers[len(layers) // 2]) as seen:
            velocity = predict(self.transformer, features, lengths, latents, times)
        patches = latents.shape[2] * latents.shape[3] // PATCH**2
        return velocity, self.reader(seen[0][:, :patches]).float()

    def take(self, pipe: ZImagePipeline) -> None:
        """Take over the weights of a pipeline's models; `CheckpointError` if they are of another size."""
        fill(self.text_encoder, pipe.text_encoder.model.state_dict(), "the text encoder to start from")
        fill(self.transformer, pipe.transformer.state_dict(), "the transformer to start from")


def predict(transformer: Any, features: Tensor, lengths: Sequence[int], latents: Tensor, times: Tensor) -> Tensor:
    """The velocity from caption features (B, padded, hidden); as in the pipeline, for a batch."""
    caption = transformer.encode_captions(features, lengths)
    grid = transformer.grid(latents.shape[2], latents.shape[3], caption.length)
    (modulation,) = transformer.modulations(times[None])
    return -transformer.denoise(latents, caption, grid, modulation).float()


@contextmanager
def outputs_of(transformer: Any, block: Any) -> Iterator[list[Tensor]]:
    """Collects what a block gives in each run of the transformer."""
    before, run, seen = dict(vars(transformer)), transformer._run_block, []

    def recorded(one: Any, *inputs: Any) -> Tensor:
        tokens: Tensor = run(one, *inputs)
        if one is block:
            seen.append(tokens)
        return tokens

    transformer._run_block = recorded
    try:
        yield seen
    finally:
        del transformer._run_block
        vars(transformer).update(before)  # a compiled one


@contextmanager
def half_precision(device: torch.device) -> Iterator[None]:
    """Products in bfloat16 where the device computes in it natively; attention as plain products (`plain_attention`).

    On a CPU without bfloat16 instructions all is float32: emulated, a training step takes many times as long.
    """
    native = choose_dtype("auto", device) == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=native), sdpa_kernel(SDPBackend.MATH):
        yield


def build_text_encoder(size: ModelSize) -> Any:
    """Qwen3 without the layer and the norm after those that are read (see `models.text_encoder`)."""
    config = Qwen3Config(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        num_key_value_heads=size.text_kv_heads,
        head_dim=size.text_head_dim,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        attn_implementation="sdpa",
    )
    model = Qwen3Model(config)
    model.norm = nn.Identity()
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(weight)  # tokens far apart: from the usual 0.02 all drift the same way first
        elif weight.ndim == 2:
            nn.init.xavier_uniform_(weight)
    return model


_SHARED = ("all_x_embedder.2-1.bias", "cap_embedder.1.bias")
"""What all patches, and all words, have in common."""


def build_transformer(size: ModelSize) -> ZImageTransformer:
    """The transformer, its gates closed and its output zero (adaLN-Zero, arXiv 2212.09748).

    Attention begins as looking at near and similar tokens: queries and keys are the same (arXiv 2305.09828), and all
    patches have a part in common, their embedding's bias, by which rotary positions tell near from far.
    """
    transformer = ZImageTransformer(
        in_channels=LATENT_CHANNELS,
        dim=size.dim,
        n_layers=size.n_layers,
        n_refiner_layers=size.n_refiner_layers,
        n_heads=size.n_heads,
        n_kv_heads=size.n_heads,
        cap_feat_dim=size.hidden_size,
        axes_dims=list(size.axes_dims),
        axes_lens=[1536, 512, 512],
    )
    for name, weight in transformer.named_parameters():
        if "adaLN_modulation" in name or (name.startswith("all_final_layer") and "linear" in name):
            nn.init.zeros_(weight)
        elif name in _SHARED or name.endswith("pad_token"):
            nn.init.normal_(weight)
        elif weight.ndim == 2:
            nn.init.xavier_uniform_(weight)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    transformer.attend = plain_attention
    for name, module in transformer.named_modules():
        if name.endswith("attention"):
            module.to_k.load_state_dict(module.to_q.state_dict())
    return transformer


def plain_attention(query: Tensor, key: Tensor, value: Tensor, backend: Any = None) -> Tensor:
    """Attention in three products: on a CPU and so few tokens its gradients cost a tenth of the fused kernel's.

    Heads stand third, (B, N, heads, head_dim); products are taken in the type of autocast, the softmax in float32.
    """
    del backend
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
    mixed: Tensor = torch.softmax(scores.float(), dim=-1) @ value
    return mixed.transpose(1, 2)


def compile_blocks(transformer: Any, text_encoder: Any = None) -> None:
    """Let blocks be compiled: a few shapes in all, a minute of waiting, and then twice the speed on a CPU."""
    torch._dynamo.config.recompile_limit = 64  # sizes of pictures and of batches, with and without gradients
    transformer._run_block = torch.compile(transformer._run_block, dynamic=False)
    for layer in () if text_encoder is None else text_encoder.layers:
        layer.compile(dynamic=False)


def make_pipeline(
    painter: Painter, tokenizer: Path, vae: Path, *, variant: str, dtype: torch.dtype = torch.bfloat16
) -> ZImagePipeline:
    """The pipeline over copies of the painter's weights in `dtype`, drawn as such a model is best drawn."""
    is_turbo = variant == TURBO.name
    return ZImagePipeline(
        get_variant(variant).shift,
        AutoencoderKL.from_pretrained(vae, torch_dtype=dtype),
        _copied(painter.text_encoder, dtype),
        load_tokenizer(tokenizer),
        _copied(painter.transformer, dtype),
        variant=variant,
        sampler=TURBO_SAMPLER if is_turbo else None,
        guidance_scale=None if is_turbo else BASE_GUIDANCE,
    )


def _copied(module: Any, dtype: torch.dtype) -> Any:
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    vars(copied).pop("attend", None)
    cast(copied, dtype=dtype)
    return copied
