"""The diffusion transformer of both variants, arranged so that nothing is computed twice in a picture.

`ZImageTransformer` has diffusers' parameters, loading and `forward`, and adds the way zimage runs it: the caption is
refined once per prompt (`encode_caption`), positions once per size (`grid`), modulations once per schedule
(`modulations`), and `denoise` works on dense latents without masks, `denoise_together` beside several captions at once.
Knows nothing of prompts, guidance or samplers, nor how a block computes (`block`).
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

from .attention import apart, attend
from .block import BlockModulation, run_block
from .precision import residual_dtype
from .rope import axis_rotations

PATCH = 2
"""Latent pixels per side of an image token."""
ROWS = 16
"""Noise levels that a modulation layer is given at once: always so many, since a product's bits may depend on that."""
TOKEN_MULTIPLE = 32
"""Image tokens and caption tokens are each filled up to a multiple of this with a learned pad, which is attended."""

BLOCKS = ("noise_refiner", "context_refiner", "layers")
"""The lists of its blocks."""

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
        return Caption(*self._run(self.context_refiner, [tokens], [rotations], [None] * len(self.context_refiner)))

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
        blocks = modulation.blocks[: len(self.noise_refiner)]
        return self._run(self.noise_refiner, [self.embed(latents, grid)], [_of_image(grid)], blocks, hint)[0]

    def refine_together(self, latents: Tensor, grids: Sequence[ImageGrid], modulation: Modulation) -> Tensor:
        """What `refine` gives on each of `grids`, (grids, B, padded, dim), with each block called once for all."""
        if len({grid.caption_length for grid in grids}) == 1:
            return self.refine(latents, grids[0], modulation).expand(len(grids), -1, -1, -1)
        blocks = modulation.blocks[: len(self.noise_refiner)]
        embedded = [self.embed(latents, grids[0])] * len(grids)
        return torch.stack(self._run(self.noise_refiner, embedded, [_of_image(grid) for grid in grids], blocks))

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
        return self._denoised([image], (caption,), (grid,), modulation, hint)[0]

    def denoise_together(
        self,
        latents: Tensor,
        captions: Sequence[Caption],
        grids: Sequence[ImageGrid],
        modulation: Modulation,
        refined: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """What `denoise` gives beside each of `captions`, (captions, B, C, H, W), with each layer called once for all.

        The tokens of all lie one after the other, and only attention tells them apart. Each of the `grids` was made for
        the length of its caption, and each of `refined`, where they are at hand, on its grid.
        """
        images = [*(self.refine_together(latents, grids, modulation) if refined is None else refined)]
        return torch.stack(self._denoised(images, captions, grids, modulation))

    def _denoised(
        self,
        images: list[Tensor],
        captions: Sequence[Caption],
        grids: Sequence[ImageGrid],
        modulation: Modulation,
        hint: Hint | None = None,
    ) -> list[Tensor]:
        """The velocity beside each of `captions`, from refined image tokens, of which `images` is emptied."""
        tokens = [
            torch.cat([image, caption.tokens.expand(len(image), -1, -1)], dim=1)  # (B, padded + caption length, dim)
            for image, caption in zip(images, captions, strict=True)
        ]
        images.clear()
        blocks = modulation.blocks[len(self.noise_refiner) :]
        done = self._run(self.layers, tokens, [grid.rotations for grid in grids], blocks, hint)
        return [self._velocity(one, grid, modulation) for one, grid in zip(done, grids, strict=True)]

    def _run(
        self,
        blocks: Iterable[Any],
        tokens: list[Tensor],
        rotations: Sequence[Tensor],
        modulations: Iterable[BlockModulation | None],
        hint: Hint | None = None,
    ) -> list[Tensor]:
        """Sequences `tokens`, each (B, N, dim), after `blocks`; the list is emptied, so that memory is free again."""
        lengths = [one.shape[1] for one in tokens]
        several = {"attend": apart(self.attend, lengths)} if len(tokens) > 1 else {}
        joined, turns = (each[0] if len(each) == 1 else torch.cat([*each], dim=1) for each in (tokens, rotations))
        tokens.clear()
        for number, (block, modulation) in enumerate(zip(blocks, modulations, strict=True)):
            with self.hold(block):
                joined = self._run_block(block, joined, turns, modulation, **several)
            joined = _hinted(joined, hint, number)
        return list(joined.split(lengths, dim=1))

    def _velocity(self, tokens: Tensor, grid: ImageGrid, modulation: Modulation) -> Tensor:
        """Denoised tokens (B, N, dim), of which those of the image come first, to the flow's velocity (B, C, H, W)."""
        final = self.all_final_layer[_PATCH_KEY]
        patches = final.norm_final(tokens[:, : grid.tokens]) * modulation.final
        patches = final.linear(patches.to(self.compute_dtype))  # (B, tokens, PATCH * PATCH * C)
        patches = patches.unflatten(1, (grid.rows, grid.columns)).unflatten(3, (PATCH, PATCH, -1))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

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

    def _run_block(
        self,
        block: Any,
        tokens: Tensor,
        rotations: Tensor,
        modulation: BlockModulation | None,
        attend: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        return run_block(block, tokens, rotations, modulation, self.compute_dtype, attend or self.attend)


def batch_captions(captions: Sequence[Caption]) -> Caption:
    """Captions of one padded length as one of a larger batch."""
    return Caption(torch.cat([caption.tokens for caption in captions]))


_PATCH_KEY = f"{PATCH}-1"


def _padded(length: int) -> int:
    return -(-length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def _of_image(grid: ImageGrid) -> Tensor:
    """Rotations (1, padded, head_dim / 2) of the image's tokens alone."""
    return grid.rotations[:, : grid.padded]


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
