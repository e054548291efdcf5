"""Random checkpoints that zimage and diffusers both load, and the one way in which the two are asked for a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from zimage import ZImagePipeline
from zimage.testing import build_checkpoint

CHANNELS = 16


@dataclass(frozen=True)
class Outcome:
    """What zimage and diffusers made of one call, as float32 tensors of one shape."""

    ours: Tensor
    theirs: Tensor

    @property
    def error(self) -> float:
        """Largest difference, relative to the largest value."""
        assert self.ours.shape == self.theirs.shape
        return ((self.ours - self.theirs).abs().max() / self.theirs.abs().max()).item()

    @property
    def rms_error(self) -> float:
        """Root mean square of the difference, relative to that of the values."""
        assert self.ours.shape == self.theirs.shape
        return ((self.ours - self.theirs).norm() / self.theirs.norm()).item()

    @property
    def identical(self) -> bool:
        return torch.equal(self.ours, self.theirs)


@dataclass(frozen=True)
class Pair:
    """The same checkpoint in zimage and in diffusers."""

    ours: ZImagePipeline
    theirs: Any

    @property
    def features(self) -> int:
        """Width of caption features."""
        return self.ours.limits.caption_features

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
        """One call of either. `prompt_embeds` are lists; diffusers has no variant and no seed, so it is told."""
        common = {
            **options,
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "output_type": output_type,
        }
        prompts = options.get("prompt_embeds") or ([prompt] if isinstance(prompt, str) else prompt)
        count = len(prompts) * options.get("num_images_per_prompt", 1)
        starts = {} if "latents" in options else {"seed": seed}
        ours = self.ours(prompt, any_size=True, progress=False, **starts, **common).images
        generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
        own = {**common, **{key: list(value) for key, value in common.items() if isinstance(value, list)}}
        theirs = self.theirs(
            prompt=list(prompt) if isinstance(prompt, list) else prompt, generator=generators, **own
        ).images
        return Outcome(torch.as_tensor(ours).float(), torch.as_tensor(theirs).float())

    def embeds(self, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
        """Random caption features of so many tokens, in the pipelines' type."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(length, self.features, generator=generator).to(self.ours.dtype) for length in lengths]


Pairs = Callable[..., Pair]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """`pairs(variant, dtype, size)`: each pair is loaded once, each checkpoint built once."""
    diffusers.utils.logging.disable_progress_bar()

    @cache
    def build(variant: str, size: str) -> Any:
        return build_checkpoint(tmp_path_factory.mktemp("parity") / f"{size}-{variant}", variant=variant, size=size)

    @cache
    def load(variant: str = "base", dtype: torch.dtype = torch.float32, size: str = "tiny") -> Pair:
        folder = build(variant, size)
        theirs = diffusers.ZImagePipeline.from_pretrained(folder, dtype=dtype)
        theirs.set_progress_bar_config(disable=True)
        return Pair(ZImagePipeline.from_pretrained(folder, dtype=dtype, device="cpu"), theirs)

    return load
