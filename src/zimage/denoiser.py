"""From a resolved request and caption features to denoising steps: where transformer, guidance and sampler meet.

`Preparation` holds what the pictures of one call share, so that nothing is computed twice; `denoising_steps` takes a
sampler's steps and sees to it that each is finite. Knows nothing of prompts' texts, pixels, files or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .errors import RequestError
from .memory.ladder import Attempt, once
from .memory.sizes import TOGETHER
from .models.compiled import computes_compiled
from .models.control import Beside, Control, Steering
from .models.precision import Float32Math, is_finite, non_finite
from .models.transformer import Caption, ImageGrid, Modulation, ZImageTransformer
from .request import ResolvedRequest
from .sampling.diversity import moved, moved_steps
from .sampling.guidance import guide, is_guided
from .sampling.known import Known, keeping
from .sampling.samplers import SAMPLERS, Sampler, SamplerStep, Steps, Velocity, for_step
from .sampling.schedule import model_timesteps, shifted_sigmas

TOGETHER_ON_CPU = 2**20
"""Numbers in the image tokens of a picture, tokens times width, up to which a CPU computes both branches of guidance
together, if they have no more than `TOGETHER` tokens. Two cores with AMX took 6 to 19 % less time for 0.02 million,
about as much for 0.8 and 1, 256 x 256 pixels at the released widths, and 3 to 5 % more for 2.2 and 3.9 million
(docs/parity.md)."""
KEPT = 8
"""Captions, sizes and schedules that a call holds at a time; a schedule of 50 steps is 50 MB at the released width."""

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Conditioning:
    """Caption features (tokens, features) of a picture; `negative` is `None` without guidance."""

    positive: Tensor
    negative: Tensor | None = None


@dataclass(frozen=True)
class NoiseLevel:
    """One noise level: the model's time `1 − sigma` and what it does to every block."""

    time: float
    modulation: Modulation


@dataclass
class Preparation:
    """What the pictures of a call share: refined captions by features, positions by size, noise levels by schedule.

    Of each the last `KEPT` are held, so that a call with a thousand prompts needs no more memory than one with a few.
    """

    transformer: ZImageTransformer
    captions: dict[int, tuple[Tensor, Caption]] = field(default_factory=dict)
    grids: dict[tuple[int, int, int], ImageGrid] = field(default_factory=dict)
    levels: dict[tuple[float, ...], dict[float, NoiseLevel]] = field(default_factory=dict)
    adapted: dict[Hashable, Preparation] = field(default_factory=dict)
    made_for: tuple[torch.device, torch.dtype] = field(init=False)

    def __post_init__(self) -> None:
        self.made_for = _place_of(self.transformer)

    @property
    def is_current(self) -> bool:
        """Whether the transformer is where it was, and computes in the type that it did."""
        return self.made_for == _place_of(self.transformer)

    def require_current(self) -> None:
        """Raises `RequestError` where the transformer was moved or converted since."""
        if not self.is_current:
            raise RequestError(
                "the pipeline was moved or converted while a picture was made with it; draw that again, and wait for "
                "pictures before `to`"
            )

    def under(self, adapters: Hashable) -> Preparation:
        """What those of the pictures share that are made with the same adapters, at the same strengths."""
        return _kept(self.adapted, adapters, lambda: Preparation(self.transformer)) if adapters else self

    def caption(self, features: Tensor) -> Caption:
        # Held with the features themselves, so that no others can come to their address.
        return _kept(self.captions, id(features), lambda: (features, self.transformer.encode_caption(features)))[1]

    def grid(self, latents: Tensor, caption: Caption) -> ImageGrid:
        key = (latents.shape[2], latents.shape[3], caption.length)
        return _kept(self.grids, key, lambda: self.transformer.grid(*key))

    def noise_levels(self, sigmas: Tensor) -> dict[float, NoiseLevel]:
        """By sigma, for every noise level but a final 0."""
        return _kept(self.levels, tuple(sigmas.tolist()), lambda: self._noise_levels(sigmas))

    def _noise_levels(self, sigmas: Tensor) -> dict[float, NoiseLevel]:
        times = model_timesteps(sigmas[sigmas > 0])
        modulations = self.transformer.modulations(times.to(self.transformer.x_pad_token.device))
        pairs = zip(times.tolist(), modulations, strict=True)
        return {sigma: NoiseLevel(*pair) for sigma, pair in zip(sigmas.tolist(), pairs, strict=False)}


def _place_of(transformer: ZImageTransformer) -> tuple[torch.device, torch.dtype]:
    return transformer.x_pad_token.device, transformer.compute_dtype


def _kept(store: dict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    if key not in store:
        if len(store) >= KEPT:
            del store[next(iter(store))]
        store[key] = make()
    return store[key]


def make_velocity(
    preparation: Preparation,
    request: ResolvedRequest,
    conditioning: Conditioning,
    control: Control | None = None,
    sigmas: Tensor | None = None,
) -> Velocity:
    """The guided flow of one picture as a function of latents (1, C, H, W) and sigma, in float32; with `control` both
    branches of guidance are steered.

    `sigmas` are the noise levels that it is asked for, by default the request's.
    """
    transformer = preparation.transformer
    levels = preparation.noise_levels(schedule(request) if sigmas is None else sigmas)
    positive = preparation.caption(conditioning.positive)
    negative = None if conditioning.negative is None else preparation.caption(conditioning.negative)
    first = _moved_captions(preparation, request, conditioning.positive, list(levels))
    steering = None
    if control is not None:
        times = [level.time for level in levels.values()]
        steering = Steering(transformer, control, times, preparation.grid(control.context, positive))
    # Compiled blocks take one sequence at a time; where compiling fails, the picture goes on as it began.
    apart = control is not None or computes_compiled(transformer)

    def refine(latents: Tensor, grid: ImageGrid, level: NoiseLevel) -> tuple[Tensor, Beside | None]:
        refined = transformer.refine(latents, grid, level.modulation)
        if steering is None:
            return refined, None
        return refined, steering.at(latents, grid, level.time, level.modulation, refined)

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        level = levels[sigma]

        def predict(caption: Caption, grid: ImageGrid, refined: Tensor, beside: Beside | None) -> Tensor:
            hint = None if beside is None else beside(caption, grid)
            return transformer.denoise(latents, caption, grid, level.modulation, refined, hint)

        caption, grid = first.get(sigma, positive), preparation.grid(latents, positive)
        if negative is None or not is_guided(level.time, request.guidance_scale, request.cfg_truncation):
            return -predict(caption, grid, *refine(latents, grid, level)).float()
        other_grid = preparation.grid(latents, negative)
        captions, grids = (caption, negative), (grid, other_grid)
        if not apart and _are_few(transformer, grids):
            prediction, other = transformer.denoise_together(latents, captions, grids, level.modulation)
        else:
            image = refine(latents, grid, level)
            prediction = predict(caption, grid, *image)
            shared = image if negative.length == positive.length else refine(latents, other_grid, level)
            other = predict(negative, other_grid, *shared)
        return -guide(prediction, other, request.guidance_scale, request.cfg_normalization)

    return velocity


def _moved_captions(
    preparation: Preparation, request: ResolvedRequest, features: Tensor, sigmas: Sequence[float]
) -> dict[float, Caption]:
    """With diversity, the caption in place of that of `features` at the first of the `sigmas`."""
    if not request.diversity:
        return {}
    caption = preparation.caption(moved(features, request.seed, request.diversity))
    return dict.fromkeys(sigmas[: moved_steps(request.steps)], caption)


def _are_few(transformer: ZImageTransformer, grids: Sequence[ImageGrid]) -> bool:
    """Whether branches of guidance on these grids are computed together: then there is a product for both, a launch for
    both, and weights are read or moved once."""
    if transformer.x_pad_token.is_cpu and grids[0].padded * transformer.config.dim > TOGETHER_ON_CPU:
        return False
    return sum(grid.padded + grid.caption_length for grid in grids) <= TOGETHER


def schedule(request: ResolvedRequest) -> Tensor:
    """The noise levels (request.steps + 1,) of a request, float32 on the CPU."""
    return shifted_sigmas(
        request.num_inference_steps, request.shift, request.sigmas, request.strength, request.keep_steps
    )


def denoising_steps(
    preparation: Preparation,
    request: ResolvedRequest,
    conditioning: Conditioning,
    latents: Tensor,
    *,
    start: int = 0,
    attempt: Attempt = once,
    known: Known | None = None,
    control: Control | None = None,
    levels: Tensor | None = None,
) -> Steps:
    """Take the request's steps from step `start` on; latents sent in replace the current ones, what of an image is
    `known` stays, and `control` steers. With `levels` (steps + 1,) the steps go along those instead of the request's.

    A step that is not finite is taken again, with everything since the caption features in float32, and so are the
    steps after it; `NonFiniteError` if that does not help. Nothing is read back from the device inside a step. What
    computes goes through `attempt`, which may do it again.
    """
    sigmas = attempt(lambda: (schedule(request) if levels is None else levels).tolist())
    sampler, total = SAMPLERS[request.sampler], len(sigmas) - 1
    sampler = sampler if known is None else keeping(sampler, known)
    velocity = attempt(lambda: make_velocity(preparation, request, conditioning, control, levels))
    safe, previous = False, None
    for index in range(start, total):
        take = partial(
            _take,
            for_step(sampler, index, request.cache, previous),
            latents=latents,
            levels=(sigmas[index], sigmas[index + 1]),
            previous=previous,
        )
        step, good = attempt(partial(take, velocity))
        if not good and not safe:
            safe = True
            velocity = attempt(lambda: _float32_velocity(preparation, request, conditioning, control, levels))
            step, good = attempt(partial(take, velocity))
        if not good:
            raise non_finite(f"denoising step {index + 1} of {total} (sigma {step.sigma:.3f})")
        previous = replace(step, index=index)
        replaced = yield previous
        latents = step.latents
        if replaced is not None:
            latents, previous = replaced, None


def _take(
    sampler: Sampler, velocity: Velocity, *, latents: Tensor, levels: tuple[float, float], previous: SamplerStep | None
) -> tuple[SamplerStep, bool]:
    """One step between two noise levels, and whether it is finite."""
    step = sampler(velocity, latents, *levels, previous)
    return step, is_finite(step.latents)


def _float32_velocity(
    preparation: Preparation,
    request: ResolvedRequest,
    conditioning: Conditioning,
    control: Control | None,
    levels: Tensor | None,
) -> Velocity:
    with Float32Math():
        velocity = make_velocity(Preparation(preparation.transformer), request, conditioning, control, levels)

    def widened(latents: Tensor, sigma: float) -> Tensor:
        with Float32Math():
            return velocity(latents, sigma)

    return widened
