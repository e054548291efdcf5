"""A ControlNet's hints beside the transformer are those of diffusers' own forward, of each kind, after the layers that
its config names; and a transformer without hints computes what it did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from torch import Tensor

from zimage.models.control import Control, Steering, build, context_of, sees_masks, share
from zimage.models.precision import Float32Math, cast
from zimage.models.transformer import ZImageTransformer
from zimage.testing.configs import SIZES
from zimage.testing.weights import Values

PLACES, REFINER_PLACES = [0, 2, 3], [1]
"""Neither evenly spread nor all: of five layers and of two refiner blocks."""
KINDS = [None, "control_layers", "control_noise_refiner"]
TRANSFORMER: dict[str, Any] = {
    "dim": 64, "n_heads": 4, "n_kv_heads": 4, "axes_dims": (4, 6, 6), "axes_lens": (512, 64, 64), "cap_feat_dim": 64,
    "n_layers": 5, "n_refiner_layers": 2,
}  # fmt: skip
TIME, SCALE = 0.3, 0.75
Parts = tuple[ZImageTransformer, ZImageControlNetModel]


def fill(module: Any, component: str) -> None:
    values = Values(component=component, size=SIZES["tiny"], seed=0, dtype=torch.float32)
    tensors = {name: values.tensor(name, tensor.shape) for name, tensor in module.state_dict().items()}
    module.load_state_dict(tensors, assign=True)
    module.eval().requires_grad_(False)


def make(kind: str | None, channels: int = 33) -> Parts:
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(**TRANSFORMER)
        net = ZImageControlNetModel(
            control_layers_places=PLACES,
            control_refiner_layers_places=REFINER_PLACES,
            control_in_dim=channels,
            add_control_noise_refiner=kind,  # type: ignore[arg-type]
            **{name: TRANSFORMER[name] for name in ("dim", "n_heads", "n_kv_heads", "n_refiner_layers")},
        )
    fill(transformer, "transformer")
    fill(net, "controlnet")
    return ZImageTransformer.share(transformer), net


def inputs(*lengths: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents of 35 tokens, so with pads, a ControlNet's input, and caption features."""
    generator = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(1, count, 10, 14, generator=generator) for count in (16, 33))
    return latents, context, [torch.randn(length, 64, generator=generator) for length in lengths]


def theirs(transformer: Any, net: Any, latents: Tensor, context: Tensor, features: Tensor, scale: float) -> Tensor:
    ZImageControlNetModel.from_transformer(net, transformer)
    given = [latents[0][:, None]], torch.tensor([TIME]), [features]
    hints = net(*given, [context[0][:, None]], conditioning_scale=scale)
    assert set(hints) == set(PLACES)
    return transformer.forward(*given, controlnet_block_samples=hints, return_dict=False)[0][0][:, 0]


def ours(
    transformer: ZImageTransformer, net: Any, latents: Tensor, context: Tensor, features: list[Tensor], scale: float
) -> list[Tensor]:
    """For each caption, all of one padded length: what is before captions is computed for the first alone."""
    captions = [transformer.encode_caption(one) for one in features]
    grid = transformer.grid(*latents.shape[2:], captions[0].length)
    times = [TIME, 0.9]
    modulation = transformer.modulations(torch.tensor(times))[0]
    steering = Steering(transformer, Control(net, context, scale), times, grid)
    refined = transformer.refine(latents, grid, modulation)
    beside = steering.at(latents, grid, TIME, modulation, refined)
    return [transformer.denoise(latents, one, grid, modulation, refined, beside(one, grid))[0] for one in captions]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hints_are_diffusers(kind: str | None) -> None:
    transformer, net = make(kind)
    latents, context, features = inputs(20, 29)
    found = ours(transformer, net, latents, context, features, SCALE)
    for one, caption in zip(found, features, strict=True):
        expected = theirs(transformer, net, latents, context, caption, SCALE)
        assert (one - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = ours(transformer, net, latents, context, features, 0.0)[0]
    assert (plain - found[0]).abs().max() > 0.1 * plain.abs().max()
    grid = transformer.grid(10, 14, 32)
    modulation = transformer.modulations(torch.tensor([TIME]))[0]
    assert torch.equal(
        plain, transformer.denoise(latents, transformer.encode_caption(features[0]), grid, modulation)[0]
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precisions_stay_near(kind: str | None) -> None:
    latents, context, features = inputs(20)
    (expected,) = ours(*make(kind), latents, context, features, SCALE)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.006)):
        transformer, net = make(kind)
        cast(transformer, dtype=dtype)
        cast(net, dtype=dtype)
        (found,) = ours(transformer, net, latents, context, features, SCALE)
        assert found.dtype == dtype
        assert (found.float() - expected).norm() <= tolerance * expected.norm()
        with Float32Math():
            (wide,) = ours(transformer, net, latents, context, features, SCALE)
        assert wide.dtype == torch.float32
        assert (wide - expected).norm() <= 0.02 * expected.norm()


@torch.no_grad()
def test_float16_hints_of_a_large_stream_do_not_overflow() -> None:
    """A stream of 1e5, which float16 has no numbers for, though the hint that it gives is small."""
    transformer, net = make(None)
    cast(transformer, dtype=torch.float16)
    cast(net, dtype=torch.float16)
    stream = torch.full((1, 32, 64), 1e5)
    layer = net.control_layers[0]
    layer.after_proj.weight.mul_(1e-3)
    steering = Steering(transformer, Control(net, inputs()[1], 1.0), [TIME], transformer.grid(10, 14, 32))
    hint = steering._hint(layer, stream)
    expected = layer.after_proj.float()(stream)
    assert hint.dtype == torch.float32
    assert (hint - expected).abs().max() <= 0.01 * expected.abs().max()


@torch.no_grad()
def test_control_blocks_run_as_the_transformers_own() -> None:
    """By whatever takes the place of that: so they are compiled where blocks are."""
    transformer, net = make("control_noise_refiner")
    plain, run = transformer._run_block, list[Any]()
    transformer._run_block = lambda block, *rest: run.append(block) or plain(block, *rest)  # type: ignore[method-assign]
    ours(transformer, net, *inputs(20), SCALE)
    assert [block for block in run if block in list(net.modules())] == [*net.control_noise_refiner, *net.control_layers]


def test_what_it_is_shown() -> None:
    control, image = torch.randn(2, 1, 16, 4, 6).unbind()
    kept = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    kept[..., :2] = True
    assert torch.equal(context_of(control, 16), control)
    padded = context_of(control, 33)
    assert torch.equal(padded[:, :16], control)
    assert not padded[:, 16:].any()
    whole = context_of(control, 33, kept, image)
    assert torch.equal(whole, torch.cat([control, kept.float(), image], dim=1))
    assert sees_masks(make(None, 33)[1], 16)
    assert not sees_masks(make(None, 16)[1], 16)


def test_a_shared_one_has_the_weights_and_nothing_of_the_transformer() -> None:
    transformer, net = make("control_layers")
    ZImageControlNetModel.from_transformer(net, transformer)
    config = {name: value for name, value in net.config.items() if not name.startswith("_")}
    same = share(net, config, torch.float32, torch.device("cpu"))
    assert set(same.state_dict()) == set(build(config).state_dict())
    assert all(tensor.data_ptr() == net.state_dict()[name].data_ptr() for name, tensor in same.state_dict().items())
    cast(same, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float32}
