"""Takes turns: every round runs a stage on zimage, then on diffusers, and holds both to the same work and results.

Unequal work and unequal results are errors, not numbers. Knows neither the command line nor files.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .._version import __version__
from ..errors import ZImageError
from ..kernels.switch import used
from ..models.graphs import uses_graphs
from ..pipeline import ZImagePipeline
from ..request import ResolvedRequest
from ..runtime import package_version
from ..sampling.noise import seeded_noise
from . import flops
from .machine import attention_kernels, describe, measure_limits, timed
from .report import Report, Stage, Timing
from .settings import Settings, texts
from .sides import Diffusers, Side, ZImage, as_tensor, counted, load

COSINE = 0.999
"""Least cosine of both sides' results of the same inputs."""
CHAINED_COSINE = 0.99
"""The same where rounding in half precision adds up over steps and guidance multiplies it (docs/parity.md)."""

ROUNDED_COSINE, ROUNDED_STEP_COSINE = 0.8, 0.95
"""The same, and after each step alone, where zimage's layers are rounded and diffusers' are not: another picture fails.
How near rounding comes is then what is measured, not what is required (docs/memory.md has it of demo models)."""

Work = Callable[[int], Callable[[Side], Any]]
"""A stage: for the round of a number, what a side does; inputs are made before, outside of its time."""


class Disagreement(ZImageError):
    """The two sides did not do the same work, or their results are not the same; a comparison would mean nothing."""


@dataclass
class Runs:
    """What one side took in the rounds of one stage."""

    times: list[float] = field(default_factory=list)
    work: list[dict[str, int]] = field(default_factory=list)
    peak: int | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model that is loaded, and what every stage is measured with."""

    settings: Settings
    pipe: ZImagePipeline
    request: ResolvedRequest
    sides: Mapping[str, Side]
    features: tuple[Tensor, ...]
    """Caption features of the prompt and, with guidance, of the negative prompt."""
    numbers: Iterator[int]
    """What makes the texts and the noise of a round new to a cache."""

    def noise(self, number: int) -> Tensor:
        """The starting latents (1, 16, h, w) of a round."""
        limits = self.pipe.limits
        height, width = (side // limits.latent_scale for side in (self.request.height, self.request.width))
        return seeded_noise(number, (limits.latent_channels, height, width))[None].to(self.pipe.device)

    def texts(self, number: int) -> tuple[str, ...]:
        return texts(self.request, number, self.settings.words)


def run(settings: Settings, *, progress: bool = False, built: Any = None) -> Report:
    """Measure as `settings` say; with `progress` a bar on stderr counts the rounds. `built`: see `sides.load`.

    Raises `RequestError` for what cannot work, and `Disagreement` where the sides' work or results differ.
    """
    pipe, theirs = load(settings, built)
    with closing(pipe), _bar(settings, progress) as bar:
        bench = prepare(settings, pipe, theirs)
        limits = measure_limits(pipe.dtype, pipe.device, _tokens(bench), pipe.transformer.config.dim)
        works, asked, stages = _works(bench), stage_flops(bench), []
        for name in settings.stages:
            runs, cosine = take_turns(bench, name, works[name], bar.update)
            stages.append(_stage(bench, name, runs, cosine, (asked[name] / 1e12, limits.product_tflops)))
        attention: dict[str, dict[str, int]] = {}
        if "denoise" in settings.stages:
            act = works["one step"](0)
            attention = {name: attention_kernels(partial(act, side), pipe.device) for name, side in bench.sides.items()}
        return _report(bench, stages, attention, vars(limits))


def prepare(settings: Settings, pipe: ZImagePipeline, theirs: Any) -> Bench:
    """Both sides of a loaded model, and what its stages start from."""
    request = pipe.resolve(settings.request(pipe.variant))
    sides: dict[str, Side] = {"zimage": ZImage(pipe, request)}
    if theirs is not None and settings.only is None:
        sides["diffusers"] = Diffusers(theirs, request)
    numbers = count()
    features = tuple(sides["zimage"].encode(texts(request, next(numbers), settings.words)))
    return Bench(settings=settings, pipe=pipe, request=request, sides=sides, features=features, numbers=numbers)


def take_turns(
    bench: Bench, stage: str, work: Work, tick: Callable[[], object] = lambda: None
) -> tuple[dict[str, Runs], float | None]:
    """Rounds of one stage, after one that warms up, and the lowest cosine of the sides' results.

    Raises `Disagreement` in the first round whose work or results differ.
    """
    runs = {name: Runs() for name in bench.sides}
    lowest: float | None = None
    device = bench.pipe.device
    with counted(bench.pipe, getattr(bench.sides.get("diffusers"), "pipe", None)) as taken:
        for index in range(bench.settings.rounds + 1):
            act, results = work(next(bench.numbers)), {}
            for name, side in bench.sides.items():
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                taken()
                seconds, result = timed(partial(act, side), device)
                results[name] = as_tensor(result)
                if index:
                    _note(runs[name], seconds, taken(), device)
            if index and len(results) > 1:
                _require_same_work(stage, {name: run.work[-1] for name, run in runs.items()})
                least = _least_cosine(bench, stage)
                lowest = min(_compare(stage, results, least), 1.0 if lowest is None else lowest)
            tick()
    return runs, lowest


def step_cosine(bench: Bench) -> float:
    """The lowest cosine of the latents after each denoising step, both sides starting each step from zimage's."""
    ours: list[Tensor] = []
    compared: list[float] = []

    def record(pipe: Any, index: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ours.append(tensors["latents"].clone())
        return {}

    def replace(pipe: Any, index: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        results = {"zimage": as_tensor(ours[index]), "diffusers": as_tensor(tensors["latents"])}
        least = ROUNDED_STEP_COSINE if bench.settings.is_rounded else COSINE
        compared.append(_compare(f"step {index + 1} of denoise", results, least))
        return {"latents": ours[index].clone()}

    noise, steps = bench.noise(next(bench.numbers)), bench.request.num_inference_steps
    for side, callback in zip(bench.sides.values(), (record, replace), strict=True):
        side.denoise(bench.features, noise, steps, callback)
    return min(compared)


def _works(bench: Bench) -> dict[str, Work]:
    """What is done in a round of each stage, and in one step."""
    steps, ours = bench.request.num_inference_steps, bench.sides["zimage"]

    def encode(number: int) -> Callable[[Side], Any]:
        texts = bench.texts(number)
        return lambda side: side.encode(texts)

    def denoise(number: int, steps: int = steps) -> Callable[[Side], Any]:
        noise = bench.noise(number)
        return lambda side: side.denoise(bench.features, noise, steps)

    @cache
    def latents() -> Tensor:
        return ours.denoise(bench.features, bench.noise(0), steps)

    def decode(number: int) -> Callable[[Side], Any]:
        final = latents()
        return lambda side: side.decode(final)

    def draw(number: int) -> Callable[[Side], Any]:
        texts = bench.texts(number)
        return lambda side: side.draw(texts, number)

    return {
        "encode": encode, "denoise": denoise, "decode": decode, "end-to-end": draw,
        "one step": partial(denoise, steps=1),
    }  # fmt: skip


def _stage(
    bench: Bench, name: str, runs: Mapping[str, Runs], cosine: float | None, scale: tuple[float, float]
) -> Stage:
    """`scale` is what the stage asks for, in TFLOP, and the matrix product's TFLOP/s."""
    tflop, product = scale
    timings = {side: _timing(run, tflop, product) for side, run in runs.items()}
    ours, theirs = timings["zimage"], timings.get("diffusers")
    return Stage(
        name=name,
        tflop=tflop,
        zimage=ours,
        diffusers=theirs,
        ratio=None if theirs is None else theirs.median_s / ours.median_s,
        cosine=cosine,
        step_cosine=step_cosine(bench) if theirs is not None and name == "denoise" else None,
    )


def stage_flops(bench: Bench) -> dict[str, int]:
    """Operations that each stage asks for."""
    request, transformer = bench.request, bench.pipe.transformer.config
    encoder, lengths = bench.pipe.text_encoder.model, [len(one) for one in bench.features]
    image = _image_tokens(bench)
    stages = {
        "encode": sum(flops.encoding_flops(encoder.config, len(encoder.layers), length) for length in lengths),
        "denoise": flops.denoising_flops(transformer, image, lengths, request.num_inference_steps),
        "decode": flops.decoding_flops(bench.pipe.autoencoder.vae.config, request.height, request.width),
    }
    return {**stages, "end-to-end": sum(stages.values())}


def _timing(runs: Runs, tflop: float, product: float) -> Timing:
    median = statistics.median(runs.times)
    single = len(runs.times) == 1
    low, _, high = (median,) * 3 if single else statistics.quantiles(runs.times, n=4, method="inclusive")
    return Timing(
        median_s=median,
        quartiles_s=(low, high),
        times_s=tuple(runs.times),
        evaluations=runs.work[0]["evaluations"],
        prompts=runs.work[0]["prompts"],
        tflops=tflop / median,
        product_share=tflop / median / product,
        peak_bytes=runs.peak,
    )


def _report(bench: Bench, stages: list[Stage], attention: dict[str, dict[str, int]], limits: dict[str, Any]) -> Report:
    settings, pipe, request = bench.settings, bench.pipe, bench.request
    return Report(
        model={
            "name": settings.size or settings.model,
            "weights": "random" if settings.size else "given",
            "variant": pipe.variant.name,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            "blocks": _blocks(pipe, settings),
            "layers": settings.layers,
        },
        picture={
            "width": request.width,
            "height": request.height,
            "steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale,
            "image_tokens": _image_tokens(bench),
            "caption_tokens": [len(one) for one in bench.features],
        },
        rounds=settings.rounds,
        machine=describe(pipe.device),
        versions={
            "zimage": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: package_version(name) for name in ("diffusers", "transformers")},
        },
        date=date.today().isoformat(),
        limits=limits,
        stages=tuple(stages),
        attention=attention,
    )


def _note(runs: Runs, seconds: float, work: dict[str, int], device: torch.device) -> None:
    runs.times.append(seconds)
    runs.work.append(work)
    if device.type == "cuda":
        runs.peak = max(runs.peak or 0, torch.cuda.max_memory_allocated(device))


def _require_same_work(stage: str, work: Mapping[str, dict[str, int]]) -> None:
    ours, theirs = work["zimage"], work["diffusers"]
    for name, number in ours.items():
        if number != theirs[name]:
            raise Disagreement(f"{stage}: unequal work: zimage {number} {name}, diffusers {theirs[name]}; not compared")


def _compare(stage: str, results: Mapping[str, Tensor], least: float) -> float:
    ours, theirs = results["zimage"], results["diffusers"]
    if ours.shape != theirs.shape:
        raise Disagreement(f"{stage}: the results differ: {len(ours)} numbers of zimage, {len(theirs)} of diffusers")
    cosine = cosine_similarity(ours, theirs, dim=0).item()
    if not cosine >= least:  # NaN is no agreement either
        raise Disagreement(f"{stage}: the results differ: cosine {cosine:.6f}, at least {least:g} is wanted")
    return cosine


def _least_cosine(bench: Bench, stage: str) -> float:
    denoised = stage in ("denoise", "end-to-end")
    if denoised and bench.settings.is_rounded:
        return ROUNDED_COSINE
    chained = denoised and bench.request.guidance_scale > 0
    return CHAINED_COSINE if chained and bench.pipe.dtype != torch.float32 else COSINE


def _image_tokens(bench: Bench) -> int:
    multiple = bench.pipe.limits.size_multiple
    return (bench.request.height // multiple) * (bench.request.width // multiple)


def _tokens(bench: Bench) -> int:
    """Tokens of one evaluation."""
    return flops.padded(_image_tokens(bench)) + flops.padded(len(bench.features[0]))


def _bar(settings: Settings, progress: bool) -> Any:
    from tqdm.auto import tqdm

    rounds = (settings.rounds + 1) * len(settings.stages)
    return tqdm(total=rounds, unit="round", disable=not progress, leave=False)


def _blocks(pipe: ZImagePipeline, settings: Settings) -> str:
    """How the transformer's blocks were run in the end: what fails on the way is left out."""
    ways = ["compiled"] if pipe.compiled else []
    if settings.compile and used(pipe.device):
        ways = ["by kernels beside compiled"]
    return ", ".join([*ways, *(["CUDA graphs"] if uses_graphs(pipe.transformer) else [])]) or "eager"
