"""The transformer's own way of running: positions, pads, batches, sharing, and that every weight is called as a module.

That its numbers are diffusers' is shown in tests/parity.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from torch import Tensor, nn

from zimage import ZImagePipeline
from zimage.models.precision import cast
from zimage.models.transformer import Caption, Modulation, ZImageTransformer, batch_captions

ROWS, COLUMNS = 10, 14
"""Latent pixels; 35 tokens, which are filled up to 64."""


@pytest.fixture(scope="module")
def transformer(base: ZImagePipeline) -> ZImageTransformer:
    """In float32; not to be changed."""
    return base.transformer


@pytest.fixture
def own(transformer: ZImageTransformer) -> ZImageTransformer:
    return copy.deepcopy(transformer)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(
    transformer: ZImageTransformer, features: Tensor, latents: Tensor | None = None, time: float = 0.3
) -> Tensor:
    latents = noise(1, 16, ROWS, COLUMNS) if latents is None else latents
    caption = transformer.encode_caption(features)
    grid = transformer.grid(*latents.shape[2:], caption.length)
    (modulation,) = transformer.modulations(torch.tensor([time]))
    return transformer.denoise(latents, caption, grid, modulation)


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize(("rows", "columns", "caption"), [(10, 14, 32), (16, 16, 64), (2, 2, 96), (64, 2, 32)])
def test_positions(transformer: ZImageTransformer, rows: int, columns: int, caption: int) -> None:
    """Caption token k at (k + 1, 0, 0), image tokens at (caption length + 1, row, column), image pads at (0, 0, 0)."""
    height, width = rows // 2, columns // 2
    image = [(caption + 1, row, column) for row in range(height) for column in range(width)]
    pads = [(0, 0, 0)] * (-len(image) % 32)
    words = [(index + 1, 0, 0) for index in range(caption)]
    rope = RopeEmbedder(theta=256.0, axes_dims=transformer.axes_dims, axes_lens=transformer.axes_lens)
    grid = transformer.grid(rows, columns, caption)
    assert torch.equal(grid.rotations[0], rope(torch.tensor(image + pads + words)))
    assert (grid.rows, grid.columns, grid.tokens) == (height, width, len(image))
    assert grid.padded == len(image) + len(pads)


@pytest.mark.parametrize(("tokens", "padded"), [(1, 32), (31, 32), (32, 32), (33, 64)])
def test_captions_are_filled_to_a_multiple_of_32(transformer: ZImageTransformer, tokens: int, padded: int) -> None:
    caption = transformer.encode_caption(noise(tokens, 64))
    assert caption.tokens.shape == (1, padded, 64)
    assert caption.length == padded


def test_caption_pads_are_attended(own: ZImageTransformer) -> None:
    full, part = noise(32, 64), noise(20, 64)
    before = predict(own, full), predict(own, part)
    own.cap_pad_token.add_(0.5)
    assert torch.equal(predict(own, full), before[0])
    assert difference(predict(own, part), before[1]) > 1e-2


def test_image_pads_are_attended(own: ZImageTransformer) -> None:
    features = noise(20, 64)
    filled = noise(1, 16, 16, 16)
    before = predict(own, features, filled), predict(own, features)
    own.x_pad_token.add_(0.5)
    assert torch.equal(predict(own, features, filled), before[0])
    assert difference(predict(own, features), before[1]) > 1e-2


def test_order_of_words_matters(transformer: ZImageTransformer) -> None:
    features = noise(20, 64)
    assert difference(predict(transformer, features.flip(0)), predict(transformer, features)) > 1e-2


def test_shapes_and_type(transformer: ZImageTransformer) -> None:
    for latents in (noise(1, 16, 2, 2), noise(1, 16, 4, 30)):
        prediction = predict(transformer, noise(5, 64), latents)
        assert prediction.shape == latents.shape
        assert prediction.isfinite().all()


def test_a_batch_gives_what_its_members_give(transformer: ZImageTransformer) -> None:
    """Members with their own latents, captions and noise levels."""
    latents = noise(2, 16, ROWS, COLUMNS)
    captions = [transformer.encode_caption(noise(length, 64, seed=length)) for length in (20, 31)]
    grid = transformer.grid(ROWS, COLUMNS, 32)
    times = torch.tensor([[0.2, 0.7], [0.4, 0.5]])
    together = [
        transformer.denoise(latents, batch_captions(captions), grid, modulation)
        for modulation in transformer.modulations(times)
    ]
    for step, member in ((0, 0), (0, 1), (1, 0), (1, 1)):
        (modulation,) = transformer.modulations(times[step, member : member + 1])
        alone = transformer.denoise(latents[member : member + 1], captions[member], grid, modulation)
        assert difference(together[step][member : member + 1], alone) <= 1e-6


def test_captions_together_are_what_each_is_alone(transformer: ZImageTransformer) -> None:
    lengths = (20, 33, 64)
    features = [noise(length, 64, seed=length) for length in lengths]
    filled = torch.stack([torch.cat([one, noise(64 - len(one), 64, seed=9)]) for one in features])
    together = transformer.encode_captions(filled, lengths)
    assert together.tokens.shape == (3, 64, 64)
    for index in (1, 2):
        alone = transformer.encode_caption(features[index])
        assert difference(together.tokens[index : index + 1], alone.tokens) <= 1e-6
    longer = transformer.encode_captions(filled[:1], [20])
    assert difference(together.tokens[:1], longer.tokens) <= 1e-6
    with pytest.raises(ValueError, match="multiple of 32 tokens, got 40"):
        transformer.encode_captions(filled[:, :40], lengths)


def test_one_caption_serves_a_batch_of_latents(transformer: ZImageTransformer) -> None:
    latents, features = noise(3, 16, ROWS, COLUMNS), noise(20, 64)
    together = predict(transformer, features, latents)
    for index in range(3):
        alone = predict(transformer, features, latents[index : index + 1])
        assert difference(together[index : index + 1], alone) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modulations_do_not_depend_on_the_schedule(own: ZImageTransformer, dtype: torch.dtype) -> None:
    own.to(dtype)

    def tensors(modulation: Modulation) -> list[Tensor]:
        return [part for block in modulation.blocks for part in block] + [modulation.final]

    times = torch.tensor([0.0, 0.1, 0.35, 0.9])
    for time, modulation in zip(times, own.modulations(times), strict=True):
        (alone,) = own.modulations(time[None])
        assert len(modulation.blocks) == len(own.noise_refiner) + len(own.layers) == 4
        assert all(torch.equal(one, other) for one, other in zip(tensors(modulation), tensors(alone), strict=True))
        assert {tensor.shape for tensor in tensors(modulation)} == {(1, 1, 64)}


def test_refined_tokens_are_shared_between_captions_of_one_length(transformer: ZImageTransformer) -> None:
    latents = noise(1, 16, ROWS, COLUMNS)
    grid = transformer.grid(ROWS, COLUMNS, 32)
    (modulation,) = transformer.modulations(torch.tensor([0.3]))
    refined = transformer.refine(latents, grid, modulation)
    assert refined.shape == (1, 64, 64)
    for length in (5, 32):
        caption = transformer.encode_caption(noise(length, 64))
        shared = transformer.denoise(latents, caption, grid, modulation, refined)
        assert torch.equal(shared, transformer.denoise(latents, caption, grid, modulation))


def test_refinement_sees_the_caption_length_through_the_pads_only(transformer: ZImageTransformer) -> None:
    """Positions count from the caption's end and attention sees differences; pads stay at position 0."""
    (modulation,) = transformer.modulations(torch.tensor([0.3]))
    for latents, least, most in ((noise(1, 16, 16, 16), 0.0, 1e-5), (noise(1, 16, ROWS, COLUMNS), 1e-3, 1.0)):
        short, long = (
            transformer.refine(latents, transformer.grid(*latents.shape[2:], length), modulation)[:, :35]
            for length in (32, 96)
        )
        assert least <= difference(long, short) <= most


@pytest.mark.parametrize("lengths", [(5,), (20, 31), (20, 40), (40, 20, 70)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_captions_beside_each_other_are_what_each_is_alone(
    transformer: ZImageTransformer, lengths: tuple[int, ...], batch: int
) -> None:
    """Also where the tokens of the image are at hand."""
    latents = noise(batch, 16, ROWS, COLUMNS)
    (modulation,) = transformer.modulations(torch.tensor([0.3]))
    captions = [transformer.encode_caption(noise(length, 64, seed=length)) for length in lengths]
    grids = [transformer.grid(ROWS, COLUMNS, caption.length) for caption in captions]
    alone = [
        transformer.denoise(latents, caption, grid, modulation) for caption, grid in zip(captions, grids, strict=True)
    ]
    together = transformer.denoise_together(latents, captions, grids, modulation)
    assert together.shape == (len(lengths), *latents.shape)
    assert all(difference(one, other) > 1e-3 for one, other in pairwise(alone))
    assert max(difference(one, other) for one, other in zip(together, alone, strict=True)) <= 1e-6
    refined = [transformer.refine(latents, grid, modulation) for grid in grids]
    again = transformer.denoise_together(latents, captions, grids, modulation, refined)
    assert difference(again, together) <= 1e-6
    assert all(one.shape == (batch, 64, 64) for one in refined)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_captions_beside_each_other_in_half_precision(own: ZImageTransformer, dtype: torch.dtype, most: float) -> None:
    cast(own, dtype=dtype)
    latents = noise(1, 16, ROWS, COLUMNS)
    (modulation,) = own.modulations(torch.tensor([0.3]))
    captions = [own.encode_caption(noise(length, 64, seed=length)) for length in (20, 40)]
    grids = [own.grid(ROWS, COLUMNS, caption.length) for caption in captions]
    together = own.denoise_together(latents, captions, grids, modulation)
    assert together.dtype == dtype
    for one, caption, grid in zip(together, captions, grids, strict=True):
        assert difference(one, own.denoise(latents, caption, grid, modulation)) <= most


@pytest.mark.parametrize("lengths", [(20, 31), (20, 40)], ids=str)
def test_captions_beside_each_other_need_each_block_once(
    transformer: ZImageTransformer, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[torch.nn.Module] = []

    @contextmanager
    def hold(block: torch.nn.Module) -> Iterator[None]:
        held.append(block)
        yield

    captions = [transformer.encode_caption(noise(length, 64)) for length in lengths]
    grids = [transformer.grid(ROWS, COLUMNS, caption.length) for caption in captions]
    (modulation,) = transformer.modulations(torch.tensor([0.3]))
    monkeypatch.setattr(transformer, "hold", hold)
    transformer.denoise_together(noise(1, 16, ROWS, COLUMNS), captions, grids, modulation)
    assert held == [*transformer.noise_refiner, *transformer.layers]


def test_share_copies_nothing() -> None:
    config = {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 64}
    theirs = ZImageTransformer2DModel(**config, axes_dims=[4, 6, 6])
    shared = ZImageTransformer.share(theirs)
    assert type(shared) is ZImageTransformer
    assert type(theirs) is ZImageTransformer2DModel
    assert shared.config == theirs.config
    assert dict(shared.named_modules()).keys() == dict(theirs.named_modules()).keys()
    assert all(one is other for one, other in zip(shared.parameters(), theirs.parameters(), strict=True))
    assert ZImageTransformer.share(shared) is shared


def test_what_is_attached_later_to_the_shared_modules_takes_effect(own: ZImageTransformer) -> None:
    theirs = ZImageTransformer2DModel.__new__(ZImageTransformer2DModel)
    theirs.__dict__.update(own.__dict__)
    shared = ZImageTransformer.share(theirs)
    before = predict(shared, noise(20, 64))
    theirs.layers[0].ffn_norm2.weight.mul_(1.5)
    assert difference(predict(shared, noise(20, 64)), before) > 1e-3


def weighted_leaves(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold weights of their own, but for the root with its pad tokens."""
    return {name: leaf for name, leaf in module.named_modules() if name and [*leaf.parameters(recurse=False)]}


def test_every_weight_is_called_as_a_module(transformer: ZImageTransformer) -> None:
    called: Counter[str] = Counter()
    leaves = weighted_leaves(transformer)
    hooks = [leaf.register_forward_hook(lambda *_, name=name: called.update([name])) for name, leaf in leaves.items()]
    try:
        predict(transformer, noise(20, 64))
    finally:
        for hook in hooks:
            hook.remove()
    assert called == dict.fromkeys(leaves, 1)
    assert len(leaves) == 6 * 13 + 4 + 7, "13 a block, 4 modulations, the embedders and the final layer"


class Adapted(nn.Module):
    """A linear layer with something beside it, in its place, as PEFT's LoRA layers stand."""

    def __init__(self, layer: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = noise(4, layer.in_features, seed=seed) / layer.in_features**0.5
        self.up = noise(layer.out_features, 4, seed=seed + 1) * 0.2

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + hidden @ self.down.T @ self.up.T


def test_layers_put_in_place_of_others_take_effect(own: ZImageTransformer) -> None:
    plain = predict(own, noise(20, 64))
    linears = [name for name, module in own.named_modules() if isinstance(module, nn.Linear)]
    for seed, name in enumerate(linears):
        parent, _, child = name.rpartition(".")
        setattr(own.get_submodule(parent), child, Adapted(own.get_submodule(name), seed))
    adapted = predict(own, noise(20, 64))
    latents = noise(1, 16, ROWS, COLUMNS)
    (reference,), *_ = own([latents[0][:, None]], torch.tensor([0.3]), [noise(20, 64)], return_dict=False)
    assert difference(adapted[0], reference[:, 0]) <= 1e-5
    assert difference(adapted, plain) > 0.1
    for name in linears:
        parent, _, child = name.rpartition(".")
        wrapped = own.get_submodule(name)
        setattr(own.get_submodule(parent), child, wrapped.base_layer)
        assert difference(predict(own, noise(20, 64)), adapted) > 1e-5, f"{name} makes no difference"
        setattr(own.get_submodule(parent), child, wrapped)


def test_attention_backends_of_diffusers(own: ZImageTransformer) -> None:
    """Those set on the model, and the one that is active everywhere, which setting also changes."""
    plain = predict(own, noise(20, 64))
    with attention_backend("native"):  # puts back the active one
        own.set_attention_backend("native")
        assert torch.equal(predict(own, noise(20, 64)), plain)
        own.set_attention_backend("_native_math")
        with_math = predict(own, noise(20, 64))
    own.reset_attention_backend()
    assert 0 < difference(with_math, plain) <= 1e-5
    assert torch.equal(predict(own, noise(20, 64)), plain)
    with attention_backend("_native_math"):
        assert torch.equal(predict(own, noise(20, 64)), with_math)


@pytest.mark.parametrize(
    ("dtype", "residual"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_precision(own: ZImageTransformer, dtype: torch.dtype, residual: torch.dtype) -> None:
    """The residual stream stays in float32 for float16; features may come in any type."""
    exact = predict(own, noise(20, 64))
    own.to(dtype)
    assert own.compute_dtype == dtype
    assert own.encode_caption(noise(20, 64)).tokens.dtype == residual
    prediction = predict(own, noise(20, 64))
    assert prediction.dtype == dtype
    assert difference(prediction.float(), exact) <= {torch.bfloat16: 5e-2}.get(dtype, 5e-3)
    assert torch.equal(predict(own, noise(20, 64).to(dtype)), prediction)


def test_large_activations_lose_nothing_in_float16(own: ZImageTransformer) -> None:
    """Weights that a norm follows grow by powers of two: activations leave float16's range, the result stays."""
    largest: dict[str, float] = {}
    hooks = []
    for name, module in own.named_modules():
        if name.endswith(("feed_forward.w1", "feed_forward.w3")):
            module.weight.mul_(128.0)
        if name.endswith("attention.to_out.0"):
            module.weight.mul_(2.0**16)
        if name.endswith(("feed_forward.w2", "attention.to_out.0")):
            hooks.append(
                module.register_forward_hook(
                    lambda _, inputs, output, name=name: largest.update(
                        {name: max(inputs[0].abs().max().item(), output.abs().max().item())}
                    )
                )
            )
    exact = predict(own, noise(20, 64))
    for hook in hooks:
        hook.remove()
    assert len(largest) == 12
    assert min(largest.values()) > 65504
    half = predict(own.to(torch.float16), noise(20, 64))
    assert difference(half.float(), exact) <= 5e-3


def test_nothing_is_kept_or_changed(transformer: ZImageTransformer) -> None:
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    attributes = dict(transformer.__dict__)
    latents, features = noise(1, 16, ROWS, COLUMNS), noise(20, 64)
    given = latents.clone(), features.clone()
    first = predict(transformer, features, latents)
    predict(transformer, noise(70, 64), noise(1, 16, 8, 8), time=0.9)
    assert torch.equal(predict(transformer, features, latents), first)
    assert torch.equal(latents, given[0])
    assert torch.equal(features, given[1])
    assert transformer.__dict__ == attributes
    assert all(torch.equal(weights[name], tensor) for name, tensor in transformer.state_dict().items())


def test_captions_are_plain_values(transformer: ZImageTransformer) -> None:
    caption = transformer.encode_caption(noise(20, 64))
    assert isinstance(caption, Caption)
    assert torch.equal(batch_captions([caption, caption]).tokens, caption.tokens.expand(2, -1, -1))
