"""Where transformer, guidance and sampler meet: the velocity's formula, what pictures share, the safe second try."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zimage import GenerationRequest, NonFiniteError, ZImagePipeline, denoiser
from zimage.denoiser import KEPT, Conditioning, Preparation, denoising_steps, make_velocity, schedule
from zimage.models.transformer import ZImageTransformer
from zimage.request import ResolvedRequest
from zimage.sampling.diversity import moved
from zimage.sampling.guidance import guide
from zimage.sampling.samplers import SAMPLERS, SamplerStep, sample
from zimage.sampling.schedule import model_timesteps, shifted_sigmas

SIZE: dict[str, Any] = {"height": 64, "width": 48, "any_size": True}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def bfloat16(base_folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(base_folder, dtype="bfloat16", device="cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LATENTS = noise(1, 16, 8, 6)
WORDS, OTHERS = noise(20, 64, seed=1), noise(40, 64, seed=2)
PLAIN, GUIDED = Conditioning(WORDS), Conditioning(WORDS, OTHERS)


def resolve(pipe: ZImagePipeline, **options: Any) -> ResolvedRequest:
    return pipe.resolve(GenerationRequest("", **{**SIZE, "num_inference_steps": 4, "guidance_scale": 0.0, **options}))


def run(pipe: ZImagePipeline, request: ResolvedRequest, conditioning: Conditioning = PLAIN) -> list[SamplerStep]:
    return list(denoising_steps(Preparation(pipe.transformer), request, conditioning, LATENTS))


def predict(transformer: ZImageTransformer, features: Tensor, time: float) -> Tensor:
    caption = transformer.encode_caption(features)
    (modulation,) = transformer.modulations(torch.tensor([time]))
    return transformer.denoise(LATENTS, caption, transformer.grid(8, 6, caption.length), modulation)


@contextmanager
def damaged(pipe: ZImagePipeline, *evaluations: int, half_only: bool = False) -> Iterator[list[torch.dtype]]:
    """NaN in the evaluations of these numbers, or with `half_only` in all that are not float32; lists their types."""
    types: list[torch.dtype] = []

    def damage(module: Any, inputs: Any, output: Tensor) -> Tensor:
        types.append(output.dtype)
        hit = len(types) - 1 in evaluations or (half_only and output.dtype != torch.float32)
        return output * float("nan") if hit else output

    hook = pipe.transformer.all_final_layer["2-1"].linear.register_forward_hook(damage)
    try:
        yield types
    finally:
        hook.remove()


@pytest.mark.parametrize("sigmas", [None, [0.9, 0.5]])
def test_schedule(base: ZImagePipeline, sigmas: list[float] | None) -> None:
    request = resolve(base, sigmas=sigmas, num_inference_steps=None if sigmas else 5)
    assert torch.equal(schedule(request), shifted_sigmas(5, 6.0, sigmas or ()))


def test_velocity_is_the_prediction_negated(base: ZImagePipeline) -> None:
    """The model predicts image minus noise; samplers follow d x / d sigma."""
    request = resolve(base)
    sigma = schedule(request)[2].item()
    velocity = make_velocity(Preparation(base.transformer), request, PLAIN)
    time = model_timesteps(schedule(request))[2].item()
    assert time == pytest.approx(1 - sigma, abs=1e-6)
    assert torch.equal(velocity(LATENTS, sigma), -predict(base.transformer, WORDS, time))


@pytest.mark.parametrize("normalization", [0.0, 0.5])
def test_velocity_with_guidance(base: ZImagePipeline, normalization: float) -> None:
    request = resolve(base, guidance_scale=4.0, cfg_normalization=normalization)
    sigma, time = schedule(request)[1].item(), model_timesteps(schedule(request))[1].item()
    positive, negative = (predict(base.transformer, features, time) for features in (WORDS, OTHERS))
    velocity = make_velocity(Preparation(base.transformer), request, GUIDED)(LATENTS, sigma)
    torch.testing.assert_close(velocity, -guide(positive, negative, 4.0, normalization), rtol=1e-5, atol=1e-5)
    if not normalization:
        torch.testing.assert_close(velocity, -(5 * positive - 4 * negative), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("limit", "most", "together_calls"),
    [("TOGETHER", 159, []), ("TOGETHER", 160, [2]), ("TOGETHER_ON_CPU", 2047, []), ("TOGETHER_ON_CPU", 2048, [2])],
)
def test_a_large_picture_has_one_branch_after_the_other(
    base: ZImagePipeline, limit: str, most: int, together_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 image tokens are filled up to 32, of 64 numbers each; captions have 32 and 64."""
    calls: list[int] = []
    together = ZImageTransformer.denoise_together

    def counted(transformer: Any, latents: Tensor, captions: Any, *rest: Any) -> Tensor:
        calls.append(len(captions))
        return together(transformer, latents, captions, *rest)

    monkeypatch.setattr(ZImageTransformer, "denoise_together", counted)
    monkeypatch.setattr(denoiser, limit, most)
    request = resolve(base, guidance_scale=4.0)
    (time,) = model_timesteps(torch.tensor([0.5])).tolist()
    made = make_velocity(Preparation(base.transformer), request, GUIDED, sigmas=torch.tensor([0.5, 0.0]))(LATENTS, 0.5)
    assert calls == together_calls
    positive, negative = (predict(base.transformer, features, time) for features in (WORDS, OTHERS))
    torch.testing.assert_close(made, -guide(positive, negative, 4.0), rtol=1e-5, atol=1e-5)


def test_a_truncated_step_is_the_one_without_guidance(base: ZImagePipeline) -> None:
    request = resolve(base, guidance_scale=4.0, cfg_truncation=0.1)
    sigmas = schedule(request).tolist()
    assert [1 - sigma > 0.1 for sigma in sigmas[:-1]] == [False, False, True, True]
    guided = make_velocity(Preparation(base.transformer), request, GUIDED)
    plain = make_velocity(Preparation(base.transformer), resolve(base), PLAIN)
    assert [torch.equal(guided(LATENTS, sigma), plain(LATENTS, sigma)) for sigma in sigmas[:-1]] == [
        False, False, True, True,
    ]  # fmt: skip


def test_velocity_is_float32_in_any_precision(bfloat16: ZImagePipeline) -> None:
    for options, conditioning in (({}, PLAIN), ({"guidance_scale": 2.0}, GUIDED)):
        velocity = make_velocity(Preparation(bfloat16.transformer), resolve(bfloat16, **options), conditioning)
        assert velocity(LATENTS, 1.0).dtype == torch.float32


def test_a_conditioning_without_its_negative_is_not_guided(base: ZImagePipeline) -> None:
    guided = make_velocity(Preparation(base.transformer), resolve(base, guidance_scale=4.0), PLAIN)
    plain = make_velocity(Preparation(base.transformer), resolve(base), PLAIN)
    assert torch.equal(guided(LATENTS, 1.0), plain(LATENTS, 1.0))


def test_preparation_computes_each_thing_once(base: ZImagePipeline) -> None:
    preparation = Preparation(base.transformer)
    caption = preparation.caption(WORDS)
    assert preparation.caption(WORDS) is caption
    assert torch.equal(preparation.caption(WORDS.clone()).tokens, caption.tokens)
    assert not torch.equal(preparation.caption(noise(20, 64, seed=9)).tokens, caption.tokens)
    grid = preparation.grid(LATENTS, caption)
    assert preparation.grid(LATENTS + 1, caption) is grid
    assert preparation.grid(LATENTS.mT, caption) is not grid
    assert preparation.grid(LATENTS, preparation.caption(OTHERS)).caption_length == 64
    levels = preparation.noise_levels(shifted_sigmas(4, 6.0))
    assert preparation.noise_levels(shifted_sigmas(4, 6.0)) is levels
    assert preparation.noise_levels(shifted_sigmas(4, 3.0)) is not levels
    assert list(levels) == shifted_sigmas(4, 6.0).tolist()[:-1]


def test_features_are_kept_while_their_caption_is(base: ZImagePipeline) -> None:
    """Captions are found by the features' identity, which is theirs as long as they live."""
    preparation = Preparation(base.transformer)
    made = [preparation.caption(noise(5, 64, seed=seed)).tokens for seed in range(20)]
    expected = [base.transformer.encode_caption(noise(5, 64, seed=seed)).tokens for seed in range(20)]
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


def test_what_pictures_share_does_not_mix_them(base: ZImagePipeline) -> None:
    asked = [
        (resolve(base), PLAIN, LATENTS),
        (resolve(base, num_inference_steps=3), Conditioning(OTHERS), LATENTS),
        (resolve(base, height=80, guidance_scale=3.0), GUIDED, noise(1, 16, 10, 6)),
        (resolve(base, sigmas=[1.0, 0.3], num_inference_steps=2), Conditioning(OTHERS, WORDS), LATENTS),
    ]
    shared = Preparation(base.transformer)
    for request, conditioning, latents in asked:
        *_, together = denoising_steps(shared, request, conditioning, latents)
        *_, alone = denoising_steps(Preparation(base.transformer), request, conditioning, latents)
        assert torch.equal(together.latents, alone.latents)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_the_samplers(base: ZImagePipeline, sampler: str) -> None:
    request = resolve(base, sampler=sampler)
    velocity = make_velocity(Preparation(base.transformer), request, PLAIN)
    expected = list(sample(SAMPLERS[sampler], velocity, LATENTS, schedule(request).tolist()))
    steps = run(base, request)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    for step, other in zip(steps, expected, strict=True):
        assert (step.sigma, step.sigma_next) == (other.sigma, other.sigma_next)
        assert torch.equal(step.latents, other.latents)
        assert torch.equal(step.denoised, other.denoised)
    assert steps[-1].sigma_next == 0


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_run_may_start_later(base: ZImagePipeline, start: int) -> None:
    request = resolve(base)
    steps = run(base, request)
    latents = steps[start - 1].latents if start else LATENTS
    later = list(denoising_steps(Preparation(base.transformer), request, PLAIN, latents, start=start))
    assert [step.index for step in later] == list(range(start, 4))
    assert torch.equal(later[-1].latents, steps[-1].latents)


def test_sent_latents_replace_the_current_ones(base: ZImagePipeline) -> None:
    request = resolve(base)
    sent = noise(1, 16, 8, 6, seed=5)
    steps = denoising_steps(Preparation(base.transformer), request, PLAIN, LATENTS)
    next(steps)
    changed = [steps.send(sent), next(steps), next(steps)]
    expected = list(denoising_steps(Preparation(base.transformer), request, PLAIN, sent, start=1))
    assert [step.index for step in changed] == [1, 2, 3]
    assert torch.equal(changed[-1].latents, expected[-1].latents)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_reads_nothing_back(base: ZImagePipeline, sampler: str) -> None:
    """On the meta device there are no values to read: a sampler's steps, guidance included, ask for none."""
    transformer = copy.deepcopy(base.transformer).to("meta")
    request = resolve(base, guidance_scale=4.0, cfg_normalization=1.0, num_inference_steps=3, sampler=sampler)
    conditioning = Conditioning(WORDS.to("meta"), OTHERS.to("meta"))
    velocity = make_velocity(Preparation(transformer), request, conditioning)
    steps = list(sample(SAMPLERS[sampler], velocity, LATENTS.to("meta"), schedule(request).tolist()))
    assert len(steps) == 3
    assert steps[-1].latents.shape == LATENTS.shape


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_passing_fault_changes_no_bit_in_float32(base: ZImagePipeline, step: int) -> None:
    expected = run(base, resolve(base))
    with damaged(base, step) as types:
        steps = run(base, resolve(base))
    assert len(types) == 4 + 1
    assert [one.index for one in steps] == [0, 1, 2, 3]
    for one, other in zip(steps, expected, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert (one.index, one.sigma, one.sigma_next) == (other.index, other.sigma, other.sigma_next)


def test_a_fault_in_half_precision_makes_the_rest_float32(bfloat16: ZImagePipeline) -> None:
    """Steps before it keep their bits, it and the ones after it are float32, and no step is tried twice but it."""
    undisturbed = run(bfloat16, resolve(bfloat16))
    with damaged(bfloat16, 2) as types:
        steps = run(bfloat16, resolve(bfloat16))
    assert types == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert [torch.equal(one.latents, other.latents) for one, other in zip(steps, undisturbed, strict=True)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert (steps[3].latents - undisturbed[3].latents).norm() <= 2e-2 * undisturbed[3].latents.norm()


def test_the_second_try_is_float32_from_the_caption_on(bfloat16: ZImagePipeline) -> None:
    """From the first step on it is what a float32 pipeline with the same weights computes."""
    widened = copy.deepcopy(bfloat16.transformer).float()
    request = resolve(bfloat16, guidance_scale=3.0, cfg_normalization=0.8)
    *_, exact = denoising_steps(Preparation(widened), request, GUIDED, LATENTS)
    with damaged(bfloat16, half_only=True) as types:
        *_, safe = run(bfloat16, request, GUIDED)
    assert types == [torch.bfloat16] * 2 + [torch.float32] * 8
    assert (safe.latents - exact.latents).abs().max() <= 1e-5 * exact.latents.abs().max()
    assert {parameter.dtype for parameter in bfloat16.transformer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("evaluation", range(7))
def test_a_fault_in_any_evaluation_of_any_sampler(base: ZImagePipeline, sampler: str, evaluation: int) -> None:
    request = resolve(base, sampler=sampler)
    expected = run(base, request)[-1].latents
    with damaged(base, evaluation):
        steps = run(base, request)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert all(step.latents.isfinite().all() for step in steps)
    if sampler != "dpmpp_2m":  # begins anew after a fault, a step of the first order
        assert torch.equal(steps[-1].latents, expected)


@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("normalization", [0.0, 1.0])
def test_a_fault_in_one_branch_of_guidance(base: ZImagePipeline, branch: int, normalization: float) -> None:
    request = resolve(base, guidance_scale=4.0, cfg_normalization=normalization)
    expected = run(base, request, GUIDED)[-1].latents
    with damaged(base, 2 + branch):
        assert torch.equal(run(base, request, GUIDED)[-1].latents, expected)
    with damaged(base, 2 + branch, 4 + branch), pytest.raises(NonFiniteError):
        run(base, request, GUIDED)


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_lasting_fault_is_an_error_that_says_where(base: ZImagePipeline, step: int) -> None:
    done: list[int] = []
    sigma = schedule(resolve(base))[step].item()
    with (
        damaged(base, step, step + 1),
        pytest.raises(
            NonFiniteError, match=rf"denoising step {step + 1} of 4 \(sigma {sigma:.3f}\) gave NaN or infinity"
        ),
    ):
        done.extend(one.index for one in denoising_steps(Preparation(base.transformer), resolve(base), PLAIN, LATENTS))
    assert done == list(range(step))


def test_there_is_one_second_try_a_run(base: ZImagePipeline) -> None:
    """What is float32 already is not made better by trying again."""
    with damaged(base, 0, 3) as types, pytest.raises(NonFiniteError, match="step 3 of 4"):
        run(base, resolve(base))
    assert len(types) == 4


def test_latents_given_are_not_changed(base: ZImagePipeline) -> None:
    before = LATENTS.clone(), WORDS.clone(), OTHERS.clone()
    run(base, resolve(base, guidance_scale=4.0, cfg_normalization=1.0), GUIDED)
    assert all(torch.equal(one, other) for one, other in zip((LATENTS, WORDS, OTHERS), before, strict=True))


def test_a_call_with_many_prompts_holds_few_captions(base: ZImagePipeline) -> None:
    """Nor many sizes or schedules: what was let go is made again, and gives the same bits."""
    preparation = Preparation(base.transformer)
    features = [noise(5 + index, 64, seed=index) for index in range(3 * KEPT)]
    first = preparation.caption(features[0]).tokens
    for index, one in enumerate(features):
        preparation.grid(LATENTS, preparation.caption(one))
        preparation.grid(noise(1, 16, 8, 2 + 2 * index), preparation.caption(one))
        preparation.noise_levels(shifted_sigmas(index + 1, 3.0))
    assert [len(held) for held in (preparation.captions, preparation.grids, preparation.levels)] == [KEPT] * 3
    assert id(features[0]) not in preparation.captions
    assert torch.equal(preparation.caption(features[0]).tokens, first)
    assert len(preparation.captions) == KEPT


def test_without_diversity_every_bit_is_as_before(turbo: ZImagePipeline) -> None:
    plain, none = (run(turbo, resolve(turbo, **options)) for options in ({}, {"diversity": 0}))
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(plain, none, strict=True))


@pytest.mark.parametrize(("steps", "first"), [(4, 1), (16, 2)])
def test_diversity_moves_the_caption_in_the_first_steps(turbo: ZImagePipeline, steps: int, first: int) -> None:
    request = resolve(turbo, seed=5, diversity=1.5, num_inference_steps=steps)
    velocity = make_velocity(Preparation(turbo.transformer), request, PLAIN)
    sigmas = schedule(request).tolist()[:-1]
    for number, sigma in enumerate(sigmas):
        features = moved(WORDS, 5, 1.5) if number < first else WORDS
        expected = -predict(turbo.transformer, features, float(model_timesteps(torch.tensor([sigma]))))
        torch.testing.assert_close(velocity(LATENTS, sigma), expected, rtol=1e-4, atol=1e-5)


def test_guidance_steers_from_the_caption_as_it_was_moved(base: ZImagePipeline) -> None:
    request = resolve(base, seed=5, diversity=1.0, guidance_scale=3.0)
    sigma = schedule(request).tolist()[0]
    time = float(model_timesteps(torch.tensor([sigma])))
    made = make_velocity(Preparation(base.transformer), request, GUIDED)(LATENTS, sigma)
    positive, negative = (predict(base.transformer, one, time) for one in (moved(WORDS, 5, 1.0), OTHERS))
    torch.testing.assert_close(made, -guide(positive, negative, 3.0, 0.0), rtol=1e-4, atol=1e-5)
