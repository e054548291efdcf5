"""Both sides of a tiny model: what is reported holds together, and unequal work or results are refused."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from zimage import RequestError
from zimage.bench import measure, sides
from zimage.bench.flops import padded
from zimage.bench.measure import Bench, Disagreement, prepare, take_turns
from zimage.bench.report import text
from zimage.bench.settings import STAGES, Settings
from zimage.models.graphs import drop_graphs, use_graphs
from zimage.models.quantized import quantize_rows

OPTIONS: dict[str, Any] = {
    "size": "tiny", "device": "cpu", "dtype": "float32", "height": 64, "width": 80, "steps": 2, "rounds": 2,
}  # fmt: skip


def make(variant: str, **options: Any) -> Bench:
    settings = Settings(**{**OPTIONS, "variant": variant, **options})
    return prepare(settings, *sides.load(settings))


@pytest.fixture(scope="module")
def turbo() -> Bench:
    return make("turbo")


@pytest.fixture(scope="module")
def base() -> Bench:
    return make("base")


def test_both_sides_are_compiled_or_neither() -> None:
    def is_compiled(theirs: Any) -> set[bool]:
        return {block._compiled_call_impl is not None for block in theirs.transformer.layers}

    pipe, theirs = sides.load(Settings(**OPTIONS))
    assert (pipe.compiled, is_compiled(theirs)) == (False, {False})
    pipe, theirs = sides.load(Settings(**OPTIONS, compile=True))
    assert (pipe.compiled, is_compiled(theirs)) == (True, {True})


def test_attention_is_that_of_the_settings(turbo: Bench) -> None:
    bench = make("turbo", attention="_native_math")
    assert (bench.pipe.attention_backend, turbo.pipe.attention_backend) == ("_native_math", "native")
    assert bench.settings.layers == turbo.settings.layers == "full"
    with pytest.raises(RequestError, match="got 'flash3'"):
        make("turbo", attention="flash3")
    rounding = Settings(**OPTIONS, attention="float8")
    assert (rounding.is_rounded, rounding.layers) == (True, "full, attention float8")
    both = Settings(**OPTIONS, weight_dtype="int8", attention="float8")
    assert both.layers == "weights in int8, attention float8"


@pytest.mark.parametrize(("kind", "activations"), [("int8", True), ("float8", False), ("nf4", False)])
def test_rounded_layers_stand_beside_the_full_ones(turbo: Bench, kind: str, activations: bool) -> None:
    """diffusers keeps its own, all else is shared, and what is required is that the picture is the same."""
    bench = make("turbo", weight_dtype=kind, quantize_activations=activations)
    ours, theirs = bench.pipe.transformer, bench.sides["diffusers"].pipe.transformer  # type: ignore[attr-defined]
    layer, full = ours.layers[0].feed_forward.w1, theirs.layers[0].feed_forward.w1
    assert (layer.kind, layer.rows) == (kind, kind if activations else None)
    stored = quantize_rows(full.weight, kind)
    assert torch.equal(layer.weight.view(torch.uint8), stored[0].view(torch.uint8))
    assert torch.equal(layer.scale, stored[1])
    assert type(full) is torch.nn.Linear
    assert ours.all_final_layer is theirs.all_final_layer
    assert ours.layers[0].attention_norm1.weight is theirs.layers[0].attention_norm1.weight
    assert ours.x_pad_token is theirs.x_pad_token
    runs, cosine = turns(bench, "denoise")
    assert {name: run.work[0]["evaluations"] for name, run in runs.items()} == {"zimage": 2, "diffusers": 2}
    assert cosine is not None
    assert measure.ROUNDED_COSINE < cosine < 0.9999999
    assert measure.ROUNDED_STEP_COSINE < measure.step_cosine(bench) < 0.9999999
    assert [measure._least_cosine(bench, stage) for stage in STAGES] == [0.999, 0.8, 0.999, 0.8]
    assert [measure._least_cosine(turbo, stage) for stage in STAGES] == [0.999] * 4


def turns(bench: Bench, stage: str) -> Any:
    return take_turns(bench, stage, measure._works(bench)[stage])


WORK = {"encode": (0, 1), "denoise": (2, 0), "decode": (0, 0), "end-to-end": (2, 1)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", ["turbo", "base"])
def test_both_sides_do_the_same(request: pytest.FixtureRequest, variant: str, stage: str) -> None:
    runs, cosine = turns(request.getfixturevalue(variant), stage)
    branches = 2 if variant == "base" else 1
    work = dict(zip(("evaluations", "prompts"), (branches * number for number in WORK[stage]), strict=True))
    assert {side: run.work for side, run in runs.items()} == {"zimage": [work] * 2, "diffusers": [work] * 2}
    assert 0.99999 < cosine <= 1.0 + 1e-9
    assert all(len(run.times) == 2 for run in runs.values())


@pytest.mark.parametrize(
    ("stage", "change", "said"),
    [
        ("denoise", lambda side, original, features, noise, steps, *_: original(side, features, noise, steps + 1),
         "denoise: unequal work: zimage 2 evaluations, diffusers 3"),
        ("encode", lambda side, original, texts: (original(side, texts), original(side, texts))[0],
         "encode: unequal work: zimage 1 prompts, diffusers 2"),
        ("decode", lambda side, original, latents: original(side, latents).roll(8, -1),
         "decode: the results differ: cosine 0.[0-9]+, at least 0.999 is wanted"),
        ("decode", lambda side, original, latents: original(side, latents)[..., 1:],
         "decode: the results differ: 15360 numbers of zimage, 15168 of diffusers"),
        ("decode", lambda side, original, latents: original(side, latents) * torch.nan, "cosine nan"),
        ("encode", lambda side, original, texts: original(side, [f"no {texts[0]}"])[0][:-1].clone(), "encode: the res"),
        ("denoise", lambda side, original, features, noise, *more: original(side, features, noise.flip(3), *more),
         "denoise: the results differ: cosine"),
        ("draw", lambda side, original, texts, seed: original(side, texts, seed).transpose(
            Image.Transpose.FLIP_LEFT_RIGHT), "end-to-end: the results differ: cosine"),
    ],
)  # fmt: skip
def test_other_work_and_other_results_are_refused(
    turbo: Bench, monkeypatch: pytest.MonkeyPatch, stage: str, change: Callable[..., Any], said: str
) -> None:
    original = getattr(sides.Diffusers, stage)
    monkeypatch.setattr(sides.Diffusers, stage, lambda side, *given: change(side, original, *given))
    with pytest.raises(Disagreement, match=said):
        turns(turbo, "end-to-end" if stage == "draw" else stage)


def test_a_cache_on_one_side_is_unequal_work(turbo: Bench) -> None:
    encoder = turbo.pipe.text_encoder
    same = replace(turbo, numbers=iter([5, 5, 5]))
    encoder.forget()
    with pytest.raises(Disagreement, match="encode: unequal work: zimage 0 prompts, diffusers 1"):
        turns(same, "encode")


def test_every_step_is_compared_from_the_same_latents() -> None:
    bench = make("base", steps=3)
    assert 0.99999 < measure.step_cosine(bench) <= 1.0 + 1e-9
    theirs: Any = bench.sides["diffusers"]
    theirs.pipe.scheduler = type(theirs.pipe.scheduler).from_config(theirs.pipe.scheduler.config, shift=1.0)
    with pytest.raises(Disagreement, match="step 1 of denoise: the results differ"):
        measure.step_cosine(bench)


def test_diffusers_goes_on_from_where_zimage_is(turbo: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no step inherits the rounding of those before it."""
    given: list[torch.Tensor] = []
    handed: list[torch.Tensor] = []

    def spy(kind: type, keep: Callable[[Any, Any], None]) -> None:
        original: Any = kind.denoise  # type: ignore[attr-defined]

        def denoise(side: Any, features: Any, noise: Any, steps: int, on_step: Any) -> Any:
            def watched(pipe: Any, index: int, time: Any, tensors: Any) -> Any:
                before = tensors["latents"].clone()
                answer = on_step(pipe, index, time, tensors)
                keep(before, answer)
                return answer

            return original(side, features, noise, steps, watched)

        monkeypatch.setattr(kind, "denoise", denoise)

    spy(sides.ZImage, lambda before, answer: given.append(before))
    spy(sides.Diffusers, lambda before, answer: handed.append(answer["latents"]))
    measure.step_cosine(turbo)
    assert len(given) == 2
    assert all(torch.equal(*pair) for pair in zip(given, handed, strict=True))


def test_rounding_may_add_up_only_with_guidance_in_half_precision(turbo: Bench, base: Bench) -> None:
    assert {measure._least_cosine(bench, stage) for bench in (turbo, base) for stage in STAGES} == {0.999}
    pipe: Any = SimpleNamespace(dtype=torch.bfloat16)
    guided, plain = (replace(bench, pipe=pipe) for bench in (base, turbo))
    assert [measure._least_cosine(guided, stage) for stage in STAGES] == [0.999, 0.99, 0.999, 0.99]
    assert {measure._least_cosine(plain, stage) for stage in STAGES} == {0.999}


def test_counting_leaves_nothing_behind(turbo: Bench) -> None:
    models = (turbo.pipe.transformer, turbo.pipe.text_encoder.model)
    with sides.counted(turbo.pipe) as taken:
        turbo.sides["zimage"].denoise(turbo.features, turbo.noise(1), 2)
        assert [taken(), taken()] == [{"evaluations": 2, "prompts": 0}, {"evaluations": 0, "prompts": 0}]
    assert not any(module._forward_pre_hooks for model in models for module in model.modules())


@pytest.mark.parametrize(("variant", "options"), [("turbo", {}), ("base", {}), ("turbo", {"weight_dtype": "int8"})])
def test_recorded_forwards_are_counted_too(variant: str, options: dict[str, Any]) -> None:
    """What stands in for a CUDA graph computes again and keeps its result in one place; rounded layers are copies."""
    bench, replays = make(variant, **options), 0

    def record(compute: Callable[[], torch.Tensor]) -> Any:
        result = torch.empty_like(compute())

        def replay() -> None:
            nonlocal replays
            replays += 1
            result.copy_(compute())

        return replay, result

    use_graphs(bench.pipe.transformer, record, "cpu")
    own = bench.pipe.transformer.denoise, bench.pipe.transformer.denoise_together
    runs, cosine = turns(bench, "denoise")
    evaluations = 2 if variant == "turbo" else 4
    assert [run.work[-1]["evaluations"] for run in runs.values()] == [evaluations] * 2
    assert replays > evaluations
    assert cosine is not None
    assert cosine > 0.999
    assert (bench.pipe.transformer.denoise, bench.pipe.transformer.denoise_together) == own
    assert measure._blocks(bench.pipe, bench.settings) == "CUDA graphs"
    drop_graphs(bench.pipe.transformer)
    assert measure._blocks(bench.pipe, bench.settings) == "eager"
    assert not any(module._forward_pre_hooks for module in bench.pipe.transformer.modules())


def test_a_report_holds_together() -> None:
    report = measure.run(Settings(**OPTIONS, variant="base"))
    assert [stage.name for stage in report.stages] == list(STAGES)
    encode, denoise, decode, whole = report.stages
    assert whole.tflop == pytest.approx(encode.tflop + denoise.tflop + decode.tflop)
    for stage in report.stages:
        theirs = stage.diffusers
        assert theirs is not None
        assert stage.ratio == theirs.median_s / stage.zimage.median_s
        assert stage.zimage.evaluations == theirs.evaluations == (4 if stage in (denoise, whole) else 0)
        for timing in (stage.zimage, theirs):
            assert timing.median_s == statistics.median(timing.times_s)
            assert min(timing.times_s) <= timing.quartiles_s[0] <= timing.median_s <= timing.quartiles_s[1]
            assert timing.tflops * timing.median_s == pytest.approx(stage.tflop)
            assert timing.product_share == pytest.approx(timing.tflops / report.limits["product_tflops"])
            assert timing.peak_bytes is None
    lengths = {padded(tokens) for tokens in report.picture["caption_tokens"]}
    assert report.attention == {  # of one branch at a time in zimage, of both at once in diffusers
        "zimage": {"_scaled_dot_product_flash_attention_for_cpu": 2 * 2 + 2 * len(lengths) + 2 * 2},
        "diffusers": {"_scaled_dot_product_flash_attention_for_cpu": 2 + 2 + 2},
    }
    assert "each step of denoise from the same latents: cosine 1.000000" in text(report)
    assert report.to_dict()["stages"][1]["step_cosine"] == denoise.step_cosine


def test_one_round_of_zimage_alone() -> None:
    report = measure.run(Settings(**{**OPTIONS, "rounds": 1}, only="zimage", stages=("decode", "denoise")))
    for stage in report.stages:
        assert (stage.diffusers, stage.ratio, stage.cosine, stage.step_cosine) == (None,) * 4
        assert stage.zimage.quartiles_s == (stage.zimage.median_s,) * 2
    assert list(report.attention) == ["zimage"]
    assert report.stages[1].zimage.evaluations == 2


@pytest.mark.parametrize("only", [None, "zimage"])
def test_a_model_that_is_there(only: str | None) -> None:
    settings = Settings(model="demo", device="cpu", dtype="float32", steps=1, rounds=1, stages=("denoise",), only=only)
    report = measure.run(settings)
    model = {
        "name": "demo",
        "weights": "given",
        "variant": "base",
        "dtype": "float32",
        "blocks": "eager",
        "layers": "full",
    }
    assert report.model == model
    assert (report.picture["width"], report.picture["guidance_scale"]) == (128, 2.0)
    assert report.stages[0].zimage.evaluations == 2
    assert (report.stages[0].diffusers is None) == (only == "zimage")


def test_how_blocks_were_run(turbo: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled ones are said, and kernels that go on beside diffusers' compiled blocks."""
    asked = replace(turbo.settings, compile=True)
    assert measure._blocks(turbo.pipe, asked) == "eager"  # as after compiling failed
    monkeypatch.setattr(measure, "used", lambda device: True)
    assert measure._blocks(turbo.pipe, turbo.settings) == "eager"
    assert measure._blocks(turbo.pipe, asked) == "by kernels beside compiled"
