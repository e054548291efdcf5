"""Random checkpoints that zimage and diffusers both load, and the one way in which the two are asked for a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from zimage import ZImagePipeline
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lines that pictures beside diffusers' reach are counted in other tests; here that takes a third of the time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.no_cover)


@dataclass(frozen=True)
class Outcome:
    """What zimage and diffusers made of one call, as float32 tensors of one shape."""

    ours: Tensor
    theirs: Tensor

    @property
    def error(self) -> float:
        """Largest difference, relative to the largest value."""
        return (self._difference.abs().max() / self.theirs.abs().max()).item()

    @property
    def rms_error(self) -> float:
        """Root mean square of the difference, relative to that of the values."""
        return (self._difference.norm() / self.theirs.norm()).item()

    @property
    def identical(self) -> bool:
        return torch.equal(self.ours, self.theirs)

    @property
    def _difference(self) -> Tensor:
        assert self.ours.shape == self.theirs.shape
        assert self.theirs.isfinite().all()
        return self.ours - self.theirs


@dataclass(frozen=True)
class Pair:
    """The same checkpoint in zimage and in diffusers."""

    ours: ZImagePipeline
    theirs: Any

    def run(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int = 80,
        width: int = 112,
        steps: int = 3,
        guidance: float = 0.0,
        seed: int = 3,
        output_type: str = "latent",
        **options: Any,
    ) -> Outcome:
        """One call of either, 35 image tokens by default; embeddings are lists.

        diffusers knows neither variants nor seeds, so it is told steps, guidance and generators; its own prompt lists,
        because it changes them.
        """
        options |= {"height": height, "width": width, "output_type": output_type}
        options |= {"num_inference_steps": steps, "guidance_scale": guidance}
        prompts = options.get("prompt_embeds") or ([prompt] if isinstance(prompt, str) else prompt)
        count = len(prompts) * options.get("num_images_per_prompt", 1)
        start = {} if "latents" in options else {"seed": seed}
        ours = self.ours(prompt, any_size=True, progress=False, **start, **options)
        copies = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
        prompt = list(prompt) if isinstance(prompt, list) else prompt
        theirs = self.theirs(prompt=prompt, generator=generators, **copies)
        return Outcome(_tensor(ours.images), _tensor(theirs.images))

    def embeds(self, *lengths: int, seed: int = 0) -> list[Tensor]:
        """Random caption features of so many tokens, in the pipelines' type."""
        generator = torch.Generator().manual_seed(seed)
        width = self.ours.limits.caption_features
        return [torch.randn(length, width, generator=generator).to(self.ours.dtype) for length in lengths]

    def tokens(self, prompt: str) -> int:
        """Length of a prompt with its template."""
        return self.ours.text_encoder.tokenize(prompt, 512).total


def _tensor(images: Any) -> Tensor:
    if isinstance(images, list):
        images = np.stack([np.asarray(image) for image in images])
    return torch.as_tensor(images).float()


Pairs = Callable[..., Pair]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """`pairs(variant, dtype, size, activations)`: each checkpoint is built once and loaded once by either.

    `small` is more and wider layers than `tiny`, of fewer layers than it has for users.
    """
    diffusers.utils.logging.disable_progress_bar()
    fewer = {"small": replace(SIZES["small"], n_layers=3, n_refiner_layers=1, text_layers=3)}

    @cache
    def build(variant: Literal["base", "turbo"], size: Literal["tiny", "small"], activations: Any) -> Path:
        folder = tmp_path_factory.mktemp("parity") / f"{size}-{variant}-{activations}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SIZES, size, fewer.get(size, SIZES[size]))
            return build_checkpoint(folder, variant=variant, size=size, activations=activations)

    @cache
    def load(
        variant: Literal["base", "turbo"] = "base",
        dtype: torch.dtype = torch.float32,
        size: Literal["tiny", "small"] = "tiny",
        activations: Literal["sane", "large"] = "sane",
    ) -> Pair:
        folder = build(variant, size, activations)
        theirs = diffusers.ZImagePipeline.from_pretrained(folder, dtype=dtype)
        theirs.set_progress_bar_config(disable=True)
        return Pair(ZImagePipeline.from_pretrained(folder, dtype=dtype, device="cpu"), theirs)

    return load
