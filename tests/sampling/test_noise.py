"""Starting noise: a seed's image does not depend on its batch, and generators are drawn from as in diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from zimage import RequestError
from zimage.sampling.noise import fresh_seed, generator_noise, seeded_noise

SHAPE = (16, 6, 8)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_seeded_noise_is_diffusers_for_a_generator_of_that_seed() -> None:
    noise = seeded_noise(7, SHAPE)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, randn_tensor(SHAPE, generator=generator(7)))
    assert torch.equal(noise, seeded_noise(7, SHAPE))
    assert not torch.equal(noise, seeded_noise(8, SHAPE))


def test_seeded_noise_is_standard_normal() -> None:
    noise = seeded_noise(0, (16, 128, 128))
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert noise.std().item() == pytest.approx(1.0, abs=0.01)


def test_no_global_random_state_is_used() -> None:
    before = torch.random.get_rng_state()
    seeded_noise(7, SHAPE)
    generator_noise(generator(7), (2, *SHAPE))
    fresh_seed(generator(7))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_fresh_seed(seed: int) -> None:
    fresh = generator(seed)
    assert fresh_seed(fresh) == seed
    assert fresh_seed(fresh) == seed, "looking at it does not use it"
    torch.randn(1, generator=fresh)
    assert fresh_seed(fresh) is None


@pytest.mark.parametrize("seed", [2**32, 2**32 + 7, 2**63 + 7, -1])
def test_seeds_beyond_32_bits_are_named_by_the_one_that_they_repeat(seed: int) -> None:
    """torch's engine uses the low 32 bits, so the noise is that of a smaller seed, which a recipe can hold."""
    named = fresh_seed(generator(seed))
    assert named == seed % 2**32
    ((_, noise),) = generator_noise(generator(seed), (1, *SHAPE))
    assert torch.equal(noise, seeded_noise(named, SHAPE))


def test_fresh_seed_of_a_reseeded_and_of_a_restored_generator() -> None:
    used = generator(7)
    torch.randn(3, generator=used)
    state = used.get_state()
    assert fresh_seed(used.manual_seed(9)) == 9
    restored = torch.Generator()
    restored.set_state(state)
    assert fresh_seed(restored) is None


def test_a_generator_that_has_half_a_pair_left_is_not_fresh() -> None:
    """Normal numbers are made in pairs; the spare one is part of the state."""
    used = generator(7)
    torch.randn(1, generator=used)
    restored = torch.Generator()
    restored.set_state(used.get_state())
    assert fresh_seed(restored) is None


def test_one_generator_draws_once_for_all_images() -> None:
    drawn = generator_noise(generator(7), (3, *SHAPE))
    assert torch.equal(torch.stack([noise for _, noise in drawn]), randn_tensor((3, *SHAPE), generator=generator(7)))
    assert [seed for seed, _ in drawn] == [7, None, None]
    assert torch.equal(drawn[0][1], seeded_noise(7, SHAPE)), "the first image is repeated by its seed alone"


def test_one_generator_goes_on_where_it_was() -> None:
    ours, theirs = generator(7), generator(7)
    for _ in range(2):
        ((_, noise),) = generator_noise(ours, (1, *SHAPE))
        assert torch.equal(noise[None], randn_tensor((1, *SHAPE), generator=theirs))
    assert generator_noise(ours, (1, *SHAPE))[0][0] is None


def test_a_list_of_generators_draws_each_for_itself() -> None:
    used = generator(3)
    torch.randn(5, generator=used)
    again = generator(3)
    torch.randn(5, generator=again)
    drawn = generator_noise([generator(7), used, generator(9)], (3, *SHAPE))
    expected = randn_tensor((3, *SHAPE), generator=[generator(7), again, generator(9)])
    assert torch.equal(torch.stack([noise for _, noise in drawn]), expected)
    assert [seed for seed, _ in drawn] == [7, None, 9]


def test_an_image_does_not_depend_on_the_others() -> None:
    together = generator_noise([generator(seed) for seed in (1, 2, 3)], (3, *SHAPE))
    alone = generator_noise([generator(2)], (1, *SHAPE))
    assert torch.equal(together[1][1], alone[0][1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([generator(1)] * 2, "2 entries for 3 images"),
        ([], "0 entries for 3 images"),
        (7, "must be a torch.Generator or a list of them, got int"),
        ([generator(1), 2, 3], "must be a torch.Generator or a list of them, got list"),
        ("abc", "got str"),
    ],
)
def test_refused(given: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        generator_noise(given, (3, *SHAPE))
