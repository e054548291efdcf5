"""Previews of a pipeline: what makes small pictures of its latents, chosen by the user or fitted at the first use."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from .errors import RequestError
from .models.preview import TinyDecoder, fit_preview
from .parts import Parts
from .rules import shown

if TYPE_CHECKING:
    from PIL import Image


class Previewing(Parts):
    """A pipeline's models, with previews of their latents."""

    _previewer: Callable[[Tensor], Image.Image] | None = None

    def preview(self, latents: Tensor) -> Image.Image:
        """A cheap picture of latents (1, 16, h, w) or (16, h, w), such as a step's `denoised`.

        As it is one pixel for each latent, so an eighth of the picture's sides, by an affine map that is fitted to the
        VAE when it is first needed; `set_preview` chooses a small decoder instead. Raises `RequestError` for a tensor
        of another shape.
        """
        channels = self.limits.latent_channels
        if (
            not isinstance(latents, Tensor)
            or latents.shape[-3:-2] != (channels,)
            or latents.shape[:-3] not in ((), (1,))
        ):
            raise RequestError(f"latents must be a tensor (1, {channels}, h, w), got {shown(latents)}")
        with self._computing():
            if self._previewer is None:
                self._previewer = fit_preview(self.autoencoder.vae)
            return self._previewer(latents.reshape(1, *latents.shape[-3:]))

    def set_preview(
        self,
        decoder: str | os.PathLike[str] = "linear",
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """What `preview` and a step's `preview()` are made by.

        Args:
            decoder: "linear" is the fitted map; "taef1", a hub id or a folder a small decoder (diffusers'
                `AutoencoderTiny`), whose pictures have the full size. It needs memory that the plan does not count.
            cache_dir, token, local_files_only: as for `from_pretrained`.

        Raises `CheckpointError` for a decoder that cannot be had or is for other latents, `RequestError` for what names
        none.
        """
        if not isinstance(decoder, str | os.PathLike):
            raise RequestError(f"decoder must be 'linear', 'taef1', a hub id or a folder, got {shown(decoder)}")
        if decoder == "linear":
            self._previewer = None
            return
        from .checkpoint.tiny import load_tiny_decoder

        vae = load_tiny_decoder(
            decoder, latent_channels=self.limits.latent_channels, dtype=self.autoencoder.vae.dtype, device=self.device,
            cache_dir=cache_dir, token=token, local_files_only=local_files_only,
        )  # fmt: skip
        self._previewer = TinyDecoder(vae)
