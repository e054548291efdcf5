"""Starting noise from seeds and generators, drawn so that an image depends on nothing but its own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import RequestError

_STATE_SEED_BYTES = 8
"""A CPU generator's state begins with the 64-bit seed it was given, of which the engine uses the low half only."""


def seeded_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of `shape` in float32 on the CPU, from a generator of its own."""
    return noise_of(torch.Generator("cpu").manual_seed(seed), shape)


def noise_of(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """The next standard normal noise of `shape` in float32 that a generator gives, where that is."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)


def fresh_seed(generator: torch.Generator) -> int | None:
    """The seed whose noise a CPU `generator` is about to give, or `None` if it was used or sits on another device."""
    if generator.device.type != "cpu":
        return None
    seed = generator.initial_seed() % 2**32
    fresh = torch.Generator("cpu").manual_seed(seed).get_state()
    same = torch.equal(generator.get_state()[_STATE_SEED_BYTES:], fresh[_STATE_SEED_BYTES:])
    return seed if same else None


def generator_noise(
    generator: torch.Generator | Sequence[torch.Generator], shape: Sequence[int]
) -> list[tuple[int | None, Tensor]]:
    """Noise for each of `shape[0]` images as diffusers draws it, with the seed that repeats it where there is one.

    One generator gives one draw for all images, each of a list its own. Raises `RequestError` for anything else.
    """
    if isinstance(generator, torch.Generator):
        first = fresh_seed(generator)
        noise = noise_of(generator, shape)
        return [(first if index == 0 else None, image) for index, image in enumerate(noise)]
    check_generators(generator, shape[0])
    return [pair for one in generator for pair in generator_noise(one, (1, *shape[1:]))]


def generator_seeds(generator: torch.Generator | Sequence[torch.Generator], count: int) -> list[int]:
    """A seed for each of `count` images: that of a fresh CPU generator, which repeats its first image, else one drawn.

    For pictures that start from an image: they need more than one draw, which a seed repeats and a tensor of noise does
    not. Raises `RequestError` for anything but a generator or a list of them.
    """
    if isinstance(generator, torch.Generator):
        first = fresh_seed(generator)
        drawn: list[int] = torch.randint(2**32, (count,), generator=generator, device=generator.device).tolist()
        return drawn if first is None else [first, *drawn[1:]]
    check_generators(generator, count)
    return [seed for one in generator for seed in generator_seeds(one, 1)]


def check_generators(generators: object, count: int) -> None:
    """Raises `RequestError` unless there is a generator for each of `count` images."""
    if not isinstance(generators, Sequence) or not all(isinstance(one, torch.Generator) for one in generators):
        raise RequestError(f"generator must be a torch.Generator or a list of them, got {type(generators).__name__}")
    if len(generators) != count:
        raise RequestError(
            f"generator has {len(generators)} entries for {count} images; pass one, or one for each image"
        )
