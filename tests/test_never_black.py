"""A picture is finite or it is not made: whatever part of a model gives NaN or infinity, at whatever step.

Faults are put into the output of each layer that has weights. One that lasts is an error. One that half precision alone
has is computed again in float32, and so is one that passes; the picture is then what float32 gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zimage import GenerationRequest, NonFiniteError, ZImagePipeline
from zimage.models.transformer import ROWS
from zimage.sampling.samplers import SAMPLERS
from zimage.testing import build_checkpoint
from zimage.testing.configs import SIZES

STEPS = 3
pytestmark = pytest.mark.no_cover  # every line is counted in other tests; here that takes a third of the time
CALL: dict[str, Any] = {"height": 32, "width": 48, "any_size": True, "num_inference_steps": STEPS, "seed": 1}
PROMPT = "a fox"

PARTS = (
    "attention_norm1", "attention.to_q", "attention.to_k", "attention.to_v", "attention.norm_q", "attention.norm_k",
    "attention.to_out.0", "attention_norm2", "ffn_norm1", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2",
    "ffn_norm2",
)  # fmt: skip
MODULATED = ("noise_refiner.0", "layers.0", "layers.1")
ONCE = (*(f"context_refiner.0.{part}" for part in PARTS), "cap_embedder.0", "cap_embedder.1")
"""Run once a picture."""
EACH_STEP = (*(f"{block}.{part}" for block in MODULATED for part in PARTS), "all_x_embedder.2-1")
EACH_LEVEL = (
    *(f"{block}.adaLN_modulation.0" for block in MODULATED), "t_embedder.mlp.0", "t_embedder.mlp.2",
    "all_final_layer.2-1.adaLN_modulation.1",
)  # fmt: skip
"""Run for all noise levels at once, a row for each, before the first step."""
LAST = "all_final_layer.2-1.linear"
LAYERS = (*ONCE, *EACH_STEP, *EACH_LEVEL, LAST)

Fault = Callable[[int, Tensor], bool]
"""Whether the call of this number, with this output, is hit."""


def always(call: int, output: Tensor) -> bool:
    return True


def in_half_precision(call: int, output: Tensor) -> bool:
    return output.dtype in (torch.float16, torch.bfloat16)


def since(first: int) -> Fault:
    return lambda call, output: call >= first


def only(number: int) -> Fault:
    return lambda call, output: call == number


@contextmanager
def fault(layer: nn.Module, hit: Fault, value: float = math.nan, row: int = 0) -> Iterator[list[torch.dtype]]:
    """`value` in one place of a row of the layer's output, where `hit` says; lists the types of all its outputs."""
    types: list[torch.dtype] = []

    def damage(module: Any, inputs: Any, output: Tensor) -> Tensor:
        types.append(output.dtype)
        if hit(len(types) - 1, output):
            output = output.clone()
            output[(row, *(0,) * (output.ndim - 1))] = value
        return output

    hook = layer.register_forward_hook(damage)
    try:
        yield types
    finally:
        hook.remove()


def weighted(module: nn.Module) -> dict[str, nn.Module]:
    """The layers with weights of their own."""
    return {name: layer for name, layer in module.named_modules() if name and [*layer.parameters(recurse=False)]}


def latents(pipe: ZImagePipeline, **options: Any) -> Tensor:
    pipe.text_encoder.forget()
    return pipe(PROMPT, output_type="latent", progress=False, **{**CALL, **options}).images


def pixels(pipe: ZImagePipeline) -> np.ndarray:
    """After one step: these are about the decoder."""
    return pipe(PROMPT, output_type="np", progress=False, **{**CALL, "num_inference_steps": 1}).images


def refused(pipe: ZImagePipeline, **options: Any) -> None:
    """The call raises, and what it hands back is no picture."""
    pipe.text_encoder.forget()
    made: list[Any] = []
    with pytest.raises(NonFiniteError, match="no picture was made"):
        made.append(pipe(PROMPT, progress=False, **{**CALL, **options}))
    assert not made


def build(folder: Path, variant: Literal["turbo", "base"]) -> Path:
    """With one refiner of each kind: what a second one does with a fault, the second layer does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", replace(SIZES["tiny"], n_refiner_layers=1))
        return build_checkpoint(folder, variant=variant)


@pytest.fixture(scope="module")
def turbo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("checkpoints") / "turbo", "turbo")


@pytest.fixture(scope="module")
def turbo(turbo_folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ZImagePipeline:
    folder = build(tmp_path_factory.mktemp("checkpoints") / "base", "base")
    return ZImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def expected(turbo: ZImagePipeline) -> Tensor:
    """Latents of the call in float32."""
    return latents(turbo)


@pytest.fixture(scope="module")
def after_one_step(turbo: ZImagePipeline) -> Tensor:
    """Those of a call of one step, for faults of which the step does not matter."""
    return latents(turbo, num_inference_steps=1)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest, turbo_folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(turbo_folder, dtype=request.param, device="cpu")


def test_no_layer_is_forgotten_here(turbo: ZImagePipeline) -> None:
    assert sorted(LAYERS) == sorted(weighted(turbo.transformer))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_lasting_fault_is_an_error(turbo: ZImagePipeline, name: str, value: float) -> None:
    with fault(turbo.transformer.get_submodule(name), always, value):
        refused(turbo)


@pytest.mark.parametrize("name", LAYERS)
def test_a_passing_fault_changes_no_bit(turbo: ZImagePipeline, after_one_step: Tensor, name: str) -> None:
    """In float32 the second try is the same computation."""
    with fault(turbo.transformer.get_submodule(name), only(0)) as types:
        assert torch.equal(latents(turbo, num_inference_steps=1), after_one_step)
    assert len(types) > 1


@pytest.mark.parametrize("name", LAYERS)
def test_a_fault_of_half_precision_is_overcome(half: ZImagePipeline, after_one_step: Tensor, name: str) -> None:
    with fault(half.transformer.get_submodule(name), in_half_precision, math.inf) as types:
        made = latents(half, num_inference_steps=1)
    assert types[0] == half.dtype
    assert types[-1] == torch.float32
    assert (made - after_one_step).norm() <= 2e-2 * after_one_step.norm()


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("name", [*EACH_LEVEL, "noise_refiner.0.attention.to_q", "layers.1.feed_forward.w2", LAST])
def test_faults_at_each_step(turbo: ZImagePipeline, expected: Tensor, name: str, step: int) -> None:
    layer = turbo.transformer.get_submodule(name)
    call, row = (0, step) if name in EACH_LEVEL else (step, 0)
    with fault(layer, only(call), row=row):
        assert torch.equal(latents(turbo), expected)
    for value in (math.nan, math.inf):
        with fault(layer, since(call), value, row=row):
            refused(turbo)


@pytest.mark.parametrize("name", EACH_LEVEL)
def test_levels_that_only_fill_up_are_read_by_nobody(turbo: ZImagePipeline, expected: Tensor, name: str) -> None:
    with fault(turbo.transformer.get_submodule(name), always, row=ROWS - 1) as types:
        assert torch.equal(latents(turbo), expected)
    assert len(types) == 1


@pytest.mark.parametrize("step", range(STEPS))
def test_faults_of_half_precision_at_each_step(half: ZImagePipeline, expected: Tensor, step: int) -> None:
    layer = half.transformer.layers[1].feed_forward.w2
    with fault(layer, lambda call, output: call >= step and in_half_precision(call, output), math.inf) as types:
        made = latents(half)
    assert types == [half.dtype] * (step + 1) + [torch.float32] * (STEPS - step)
    assert (made - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("call", range(2 * STEPS))
def test_faults_in_each_evaluation_with_guidance(base: ZImagePipeline, sampler: str, call: int) -> None:
    """Two evaluations a step, four with Heun: in the one with the prompt as in the one without."""
    options: dict[str, Any] = {"guidance_scale": 4.0, "cfg_normalization": 1.0, "sampler": sampler}
    layer = base.transformer.get_submodule(LAST)
    with fault(layer, only(call)):
        assert latents(base, **options).isfinite().all()
    with fault(layer, since(call)):
        refused(base, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_text_encoder(turbo: ZImagePipeline, expected: Tensor, value: float) -> None:
    """Nothing that is not finite is kept for the next call either."""
    layers = weighted(turbo.text_encoder.model)
    assert len(layers) == 1 + 2 * 11
    for name, layer in layers.items():
        with fault(layer, always, value):
            refused(turbo)
        with fault(layer, only(0), value) as types:
            assert torch.equal(turbo(PROMPT, output_type="latent", progress=False, **CALL).images, expected), name
        assert len(types) == 2


def test_text_encoder_in_half_precision(half: ZImagePipeline, expected: Tensor) -> None:
    for name, layer in weighted(half.text_encoder.model).items():
        with fault(layer, in_half_precision, math.inf) as types:
            made = latents(half)
        assert types == [half.dtype, torch.float32], name
        assert (made - expected).norm() <= 2e-2 * expected.norm(), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_image_decoder(turbo: ZImagePipeline, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder with a hook is diffusers', and so is its rounding where it enlarges."""
    monkeypatch.setattr("zimage.models.autoencoder.upsample", lambda module, hidden: module(hidden))
    exact = pixels(turbo)
    layers = weighted(turbo.autoencoder.vae.decoder)
    assert len(layers) > 20
    for name, layer in layers.items():
        with fault(layer, always, value):
            refused(turbo, num_inference_steps=1)
        with fault(layer, only(0), value) as types:
            assert np.array_equal(pixels(turbo), exact), name
        assert len(types) == 2


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_image_decoder_for_every_output(turbo: ZImagePipeline, output_type: str) -> None:
    with fault(turbo.autoencoder.vae.decoder.conv_out, always, -math.inf):
        refused(turbo, output_type=output_type)


def test_image_decoder_in_half_precision(half: ZImagePipeline) -> None:
    exact = pixels(half)
    for name, layer in weighted(half.autoencoder.vae.decoder).items():
        with fault(layer, in_half_precision) as types:
            made = pixels(half)
        assert types == [half.dtype, torch.float32], name
        assert np.sqrt(np.mean((made - exact) ** 2)) <= 2e-2, name


def test_damaged_weights(turbo_folder: Path) -> None:
    """One NaN in any tensor that the pipeline reads, or a whole one for the token embeddings: never a picture."""
    pipe = ZImagePipeline.from_pretrained(turbo_folder, dtype="float32", device="cpu")
    models = (pipe.text_encoder.model, pipe.transformer, pipe.autoencoder.vae.decoder)
    tensors = {
        f"{type(model).__name__}.{name}": tensor for model in models for name, tensor in model.named_parameters()
    }
    assert len(tensors) > 150
    before = latents(pipe)
    for name, tensor in tensors.items():
        kept = tensor.detach().clone()
        with torch.no_grad():
            if "embed_tokens" in name:
                tensor.fill_(math.nan)
            else:
                tensor[(0,) * tensor.ndim] = math.nan
        try:
            refused(pipe, num_inference_steps=1)
        except BaseException as error:
            raise AssertionError(f"{name} was damaged and nobody noticed") from error
        with torch.no_grad():
            tensor.copy_(kept)
    assert torch.equal(latents(pipe), before)


def test_a_stream_breaks_off(turbo: ZImagePipeline) -> None:
    """The steps before the fault are there; the one that would carry the picture is not."""
    taken = []
    with (
        fault(turbo.transformer.get_submodule(LAST), since(STEPS - 1)),
        pytest.raises(NonFiniteError, match=f"step {STEPS} of {STEPS}"),
    ):
        taken.extend(turbo.stream(GenerationRequest(PROMPT, **CALL)))
    assert [step.index for step in taken] == list(range(STEPS - 1))
    assert all(step.image is None and step.latents.isfinite().all() for step in taken)


def test_a_stream_of_a_damaged_decoder_has_no_last_step(turbo: ZImagePipeline) -> None:
    taken = []
    with (
        fault(turbo.autoencoder.vae.decoder.conv_out, always),
        pytest.raises(NonFiniteError, match="the image decoder"),
    ):
        taken.extend(turbo.stream(GenerationRequest(PROMPT, **CALL)))
    assert all(step.image is None for step in taken)


def test_nothing_of_a_fault_is_left(half: ZImagePipeline) -> None:
    """After errors and second tries the pipeline computes what it did before, in the precision it did."""
    before = latents(half)
    layer = half.transformer.get_submodule("layers.0.attention.to_q")
    with fault(layer, always):
        refused(half)
    with fault(layer, in_half_precision):
        latents(half)
    with fault(layer, lambda call, output: False) as types:
        assert torch.equal(latents(half), before)
    assert types == [half.dtype] * STEPS


def test_one_bad_picture_of_a_call_is_an_error_for_the_call(turbo: ZImagePipeline) -> None:
    with fault(turbo.transformer.get_submodule(LAST), since(STEPS)) as types:
        refused(turbo, num_images_per_prompt=2)
    assert len(types) == STEPS + 2
