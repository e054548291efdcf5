"""The diffusion transformer of both variants, arranged so that nothing is computed twice in a picture.

`ZImageTransformer` has diffusers' parameters, loading and `forward`, and adds the way zimage runs it: the caption is
refined once per prompt (`encode_caption`), positions once per size (`grid`), modulations once per schedule
(`modulations`), and `denoise` works on dense latents without masks or lists. Every submodule that holds weights is
called as a module, so adapters and quantised layers take effect. Knows nothing of prompts, guidance or samplers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor, nn

from .attention import attend, row_kind_of
from .layers import add_normalized, add_then_normalize, gate, normalize, rotate_normalized, row_kind
from .precision import overflow_scale, residual_dtype
from .rope import axis_rotations
from .rowwise import Rows

PATCH = 2
"""Latent pixels per side of an image token."""
ROWS = 16
"""Noise levels that a modulation layer is given at once: always so many, since a product's bits may depend on that."""
TOKEN_MULTIPLE = 32
"""Image tokens and caption tokens are each filled up to a multiple of this with a learned pad, which is attended."""

BLOCKS = ("noise_refiner", "context_refiner", "layers")
"""The lists of its blocks."""

BlockModulation = tuple[Tensor, Tensor, Tensor, Tensor]
"""attention scale, attention gate, feed-forward scale, feed-forward gate; each (B, 1, dim)."""
Hint = Callable[[int], Tensor | None]
"""What is added to the tokens after a block, by its number in its list; each is asked for once, in order."""


@dataclass(frozen=True)
class Caption:
    """A prompt as the image tokens see it: `tokens` (B, length, dim), length a multiple of 32."""

    tokens: Tensor

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class ImageGrid:
    """Where the tokens of one image size sit beside a caption of `caption_length` tokens.

    `rotations` is (1, image tokens + pads + caption_length, head_dim / 2), complex.
    """

    rows: int
    columns: int
    caption_length: int
    rotations: Tensor

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def padded(self) -> int:
        return _padded(self.tokens)


@dataclass(frozen=True)
class Modulation:
    """What one noise level does to every block: by block in the order noise refiner, layers; and the final scale."""

    blocks: tuple[BlockModulation, ...]
    final: Tensor  # (B, 1, dim)


class ZImageTransformer(ZImageTransformer2DModel):
    """diffusers' transformer with the same weights and `forward`, and a faster way to run it (see the module)."""

    attend: Callable[..., Tensor] = staticmethod(attend)
    """Attention of queries, keys and values (B, N, heads, head_dim); an instance may have its own."""
    hold: Callable[[nn.Module], AbstractContextManager[None]] = staticmethod(lambda block: nullcontext())
    """Within it a block has its weights on the device; an instance whose blocks come and go has its own."""

    @classmethod
    def share(cls, transformer: ZImageTransformer2DModel) -> ZImageTransformer:
        """The same modules and weights, adapters included, as a `ZImageTransformer`; nothing is copied."""
        if isinstance(transformer, cls):
            return transformer
        shared = cls.__new__(cls)
        shared.__dict__.update(transformer.__dict__)
        return shared

    def to_json_string(self) -> str:
        """The config as diffusers writes it, under the name of its own class: so what it saves it can load."""
        own, theirs = (f'"_class_name": "{one.__name__}"' for one in (type(self), ZImageTransformer2DModel))
        written: str = super().to_json_string()
        return written.replace(own, theirs)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that blocks compute in: that of the norms, which no quantisation touches."""
        return self.cap_embedder[0].weight.dtype

    def encode_caption(self, features: Tensor) -> Caption:
        """Refine caption features (tokens, cap_feat_dim) into a `Caption` of batch 1."""
        length = features.shape[0]
        fill = _padded(length) - length
        return self.encode_captions(torch.cat([features, features[-1:].expand(fill, -1)])[None], [length])

    def encode_captions(self, features: Tensor, lengths: Sequence[int]) -> Caption:
        """Refine the features (B, padded, cap_feat_dim) of captions of one padded length, a multiple of 32.

        What stands at and after a caption's own of the `lengths` is ignored: the learned pad takes its place.
        """
        padded = features.shape[1]
        if padded % TOKEN_MULTIPLE:
            raise ValueError(f"captions must be filled up to a multiple of {TOKEN_MULTIPLE} tokens, got {padded}")
        tokens = self.cap_embedder(features.to(self.compute_dtype))  # (B, padded, dim)
        if min(lengths) < padded:
            ends = torch.tensor(lengths, device="cpu")[:, None]
            is_pad = torch.arange(padded, device="cpu") >= ends  # (B, padded)
            tokens = torch.where(is_pad[..., None].to(tokens.device), self.cap_pad_token.to(tokens.dtype), tokens)
        tokens = tokens.to(residual_dtype(self.compute_dtype))
        rotations = self._caption_rotations(padded, tokens.device)[None]
        for block in self.context_refiner:
            with self.hold(block):
                tokens = self._run_block(block, tokens, rotations, None)
        return Caption(tokens)

    def grid(self, latent_height: int, latent_width: int, caption_length: int) -> ImageGrid:
        """Positions of the tokens of a latent image (height and width in latent pixels) beside a caption."""
        rows, columns = latent_height // PATCH, latent_width // PATCH
        device = self.x_pad_token.device
        axes = [
            axis_rotations(torch.arange(start, start + count, device="cpu"), size, self.rope_theta).to(device)
            for start, count, size in zip((caption_length + 1, 0, 0), (1, rows, columns), self.axes_dims, strict=True)
        ]
        image = torch.cat(
            [
                axes[0][:, None].expand(rows, columns, -1),
                axes[1][:, None].expand(rows, columns, -1),
                axes[2][None].expand(rows, columns, -1),
            ],
            dim=-1,
        ).flatten(0, 1)  # (tokens, head_dim / 2)
        pads = image.new_ones(_padded(len(image)) - len(image), image.shape[1])  # position (0, 0, 0)
        rotations = torch.cat([image, pads, self._caption_rotations(caption_length, device)])[None]
        return ImageGrid(rows=rows, columns=columns, caption_length=caption_length, rotations=rotations)

    def modulations(self, timesteps: Tensor) -> tuple[Modulation, ...]:
        """One `Modulation` for each row of `timesteps` (steps,) or (steps, B): model times `1 − sigma` in [0, 1].

        Linear layers see `ROWS` at a time, filled up, so that a noise level gives the same bits in any schedule.
        """
        by_step = self._by_step(timesteps)
        own = _modulations(chain(self.noise_refiner, self.layers), by_step)
        final = 1.0 + by_step(self.all_final_layer[_PATCH_KEY].adaLN_modulation).unsqueeze(2)
        return tuple(Modulation(blocks, last) for blocks, last in zip(own, final, strict=True))

    def modulations_of(self, blocks: Iterable[Any], timesteps: Tensor) -> tuple[tuple[BlockModulation, ...], ...]:
        """For each row of `timesteps`, as `modulations` has them, that of each of some other model's `blocks`."""
        return _modulations(blocks, self._by_step(timesteps))

    def embed(self, latents: Tensor, grid: ImageGrid, embedder: Any = None) -> Tensor:
        """Latents (B, C, H, W) to image tokens (B, padded, dim), by the model's own embedder or another's."""
        batch, channels = latents.shape[:2]
        patches = latents.to(self.compute_dtype).reshape(batch, channels, grid.rows, PATCH, grid.columns, PATCH)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, tokens, PATCH * PATCH * C)
        tokens = (embedder or self.all_x_embedder[_PATCH_KEY])(patches)  # (B, tokens, dim)
        if grid.padded > grid.tokens:
            pads = self.x_pad_token.to(tokens.dtype).expand(batch, grid.padded - grid.tokens, -1)
            tokens = torch.cat([tokens, pads], dim=1)  # (B, padded, dim)
        return tokens.to(residual_dtype(self.compute_dtype))

    def refine(self, latents: Tensor, grid: ImageGrid, modulation: Modulation, hint: Hint | None = None) -> Tensor:
        """Latents (B, C, H, W) to refined image tokens (B, padded, dim): the part that no caption enters.

        Two captions of the same padded length share it bit for bit.
        """
        tokens, rotations = self.embed(latents, grid), grid.rotations[:, : grid.padded]
        for number, (block, block_modulation) in enumerate(zip(self.noise_refiner, modulation.blocks, strict=False)):
            with self.hold(block):
                tokens = self._run_block(block, tokens, rotations, block_modulation)
            tokens = _hinted(tokens, hint, number)
        return tokens

    def denoise(
        self,
        latents: Tensor,
        caption: Caption,
        grid: ImageGrid,
        modulation: Modulation,
        refined: Tensor | None = None,
        hint: Hint | None = None,
    ) -> Tensor:
        """The flow's velocity from noise to image at the latents (B, C, H, W), in the compute type.

        `caption` has batch B or 1 and the length that `grid` was made for; `refined` is `refine`'s result, where
        it is at hand already. The sign is the model's own: the Euler step takes it negated.
        """
        image = self.refine(latents, grid, modulation) if refined is None else refined
        words = caption.tokens.expand(len(image), -1, -1)
        tokens = torch.cat([image, words], dim=1)  # (B, padded + caption length, dim)
        modulations = modulation.blocks[len(self.noise_refiner) :]
        for number, (block, block_modulation) in enumerate(zip(self.layers, modulations, strict=True)):
            with self.hold(block):
                tokens = self._run_block(block, tokens, grid.rotations, block_modulation)
            tokens = _hinted(tokens, hint, number)
        final = self.all_final_layer[_PATCH_KEY]
        patches = final.norm_final(tokens[:, : grid.tokens]) * modulation.final
        patches = final.linear(patches.to(self.compute_dtype))  # (B, tokens, PATCH * PATCH * C)
        patches = patches.unflatten(1, (grid.rows, grid.columns)).unflatten(3, (PATCH, PATCH, -1))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

    def _caption_rotations(self, length: int, device: torch.device) -> Tensor:
        positions = torch.arange(1, length + 1, device="cpu")
        first = axis_rotations(positions, self.axes_dims[0], self.rope_theta)  # (length, axis / 2)
        rest = first.new_ones(length, sum(self.axes_dims[1:]) // 2)
        return torch.cat([first, rest], dim=1).to(device)

    def _by_step(self, timesteps: Tensor) -> Callable[[Any], Tensor]:
        """Of a modulation layer, what it gives (steps, B, out) for `timesteps` (steps,) or (steps, B)."""
        shape = timesteps.shape if timesteps.ndim == 2 else (len(timesteps), 1)
        times = timesteps.reshape(-1) * self.t_scale
        parts = F.pad(times, (0, -len(times) % ROWS)).split(ROWS)
        embeddings = [self.t_embedder(part).to(self.compute_dtype) for part in parts]  # (ROWS, width)

        def by_step(layer: Any) -> Tensor:
            rows = [layer(embedding) for embedding in embeddings]
            return torch.cat(rows)[: len(times)].unflatten(0, shape)

        return by_step

    def _run_block(self, block: Any, tokens: Tensor, rotations: Tensor, modulation: BlockModulation | None) -> Tensor:
        return run_block(block, tokens, rotations, modulation, self.compute_dtype, self.attend)


def run_block(
    block: Any,
    tokens: Tensor,
    rotations: Tensor,
    modulation: BlockModulation | None,
    compute_dtype: torch.dtype,
    attend: Callable[..., Tensor],
) -> Tensor:
    """`tokens` (B, N, dim) after `block`, of the residual stream's type; `rotations` (1, N, head_dim / 2), complex."""
    scale = overflow_scale(compute_dtype)
    attention_scale, attention_gate, feed_forward_scale, feed_forward_gate = modulation or (None,) * 4
    attention, feed_forward = block.attention, block.feed_forward
    kind = row_kind(attention.to_q, attention.to_k, attention.to_v)
    hidden = normalize(block.attention_norm1, tokens, attention_scale, kind)
    update = _attention(attention, hidden, rotations, scale, attend)
    kind = row_kind(feed_forward.w1, feed_forward.w3)
    tokens, hidden = add_then_normalize(
        tokens, block.attention_norm2, update, attention_gate, block.ffn_norm1, feed_forward_scale, kind
    )
    update = _feed_forward(feed_forward, hidden, scale)
    return add_normalized(tokens, block.ffn_norm2, update, feed_forward_gate)


def batch_captions(captions: Sequence[Caption]) -> Caption:
    """Captions of one padded length as one of a larger batch."""
    return Caption(torch.cat([caption.tokens for caption in captions]))


_PATCH_KEY = f"{PATCH}-1"


def _padded(length: int) -> int:
    return -(-length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def _hinted(tokens: Tensor, hint: Hint | None, number: int) -> Tensor:
    added = None if hint is None else hint(number)
    return tokens if added is None else tokens + added


def _modulations(blocks: Iterable[Any], by_step: Callable[[Any], Tensor]) -> tuple[tuple[BlockModulation, ...], ...]:
    """By step, those of all `blocks`."""
    return tuple(zip(*(_block_modulations(by_step(block.adaLN_modulation)) for block in blocks), strict=True))


def _block_modulations(rows: Tensor) -> tuple[BlockModulation, ...]:
    """Rows (steps, B, 4 · dim) of one block's modulation layer, by step."""
    attention_scale, attention_gate, feed_forward_scale, feed_forward_gate = rows.unsqueeze(2).chunk(4, dim=3)
    parts = (1.0 + attention_scale, attention_gate.tanh(), 1.0 + feed_forward_scale, feed_forward_gate.tanh())
    return tuple(zip(*parts, strict=True))


def _attention(attention: Any, hidden: Rows, rotations: Tensor, scale: float, attend: Callable[..., Tensor]) -> Tensor:
    def heads(project: Any) -> Tensor:
        return project(hidden).unflatten(-1, (attention.heads, -1))  # (B, N, heads, head_dim)

    value = heads(attention.to_v)
    kind = row_kind_of(attend, value)
    query, key = rotate_normalized(
        attention.norm_q, attention.norm_k, heads(attention.to_q), heads(attention.to_k), rotations, kind
    )
    mixed = attend(query, key, value, backend=attention.processor._attention_backend)
    mixed = mixed.flatten(2, 3)  # (B, N, dim)
    if scale != 1.0:
        mixed = mixed * scale
    for module in attention.to_out:
        mixed = module(mixed)
    return mixed if scale == 1.0 else mixed.float() / scale


def _feed_forward(feed_forward: Any, hidden: Rows, scale: float) -> Tensor:
    product = gate(feed_forward.w1, feed_forward.w3, hidden, scale, row_kind(feed_forward.w2))
    update = feed_forward.w2(product)
    return update if scale == 1.0 else update.float() / scale
