"""Fused kernels on CUDA: the plain expressions' numbers at the released widths, the same bits each time, no waiting.

tests/kernels has the same comparisons at small sizes and for every shape; where there is a device it uses that.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from zimage import ZImagePipeline
from zimage.kernels import fused
from zimage.kernels.switch import using
from zimage.models import layers, pictures
from zimage.models.pixel_attention import attend
from zimage.models.transformer import ZImageTransformer
from zimage.testing import build_checkpoint, build_diffusers

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_grad")]
DTYPES = ["float32", "bfloat16", "float16"]
TOKENS, DIM, HEADS, HIDDEN = 4096 + 128, 3840, 30, 10240
"""A picture of 1024² and its caption in the released models."""
Calls = dict[str, Callable[[], Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("gpu") / "small", size="small", variant="base")


def calls(dtype: torch.dtype) -> Calls:
    """What a block does between its matrix products, at the released widths; each may be called again."""
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(of)

    def norm(width: int) -> RMSNorm:
        layer = RMSNorm(width, eps=1e-5)
        layer.weight = nn.Parameter(noise(width), requires_grad=False)
        return layer

    wide = torch.float32 if dtype == torch.float16 else dtype
    tokens, update = noise(1, TOKENS, DIM, of=wide), noise(1, TOKENS, DIM, of=wide)
    factors, norms = (noise(1, 1, DIM), noise(1, 1, DIM)), (norm(DIM), norm(DIM))
    heads, head_norms = noise(1, TOKENS, 3, HEADS, DIM // HEADS), (norm(DIM // HEADS), norm(DIM // HEADS))
    angles = 3.0 * noise(1, TOKENS, DIM // HEADS // 2, of=torch.float32)
    rotations = torch.polar(torch.ones_like(angles), angles)
    opening, content = noise(1, TOKENS, HIDDEN), noise(1, TOKENS, HIDDEN)
    scale = 2.0**-8 if dtype == torch.float16 else 1.0
    query, key = heads[:, :, 0], heads[:, :, 1]
    groups = nn.GroupNorm(32, 128, device="cuda", dtype=dtype)
    bias = noise(128)
    convolution = nn.Conv2d(128, 128, 3, padding=1, device="cuda", dtype=dtype)
    picture = (2.0 * noise(1, 128, 1024, 1024) + 1.0).contiguous(memory_format=torch.channels_last)
    return {
        "activate groups": lambda: layers.activate(groups, picture),
        "activate biased groups": lambda: layers.activate(groups, picture.clone(), bias),
        "add pictures": lambda: pictures.add(picture.clone(), bias, picture.clone(), bias),
        "convolve": lambda: pictures.convolve(convolution, picture),
        "normalize": lambda: layers.normalize(norms[0], tokens, factors[0]),
        "add": lambda: layers.add_normalized(tokens, norms[0], update, factors[0]),
        "add and normalize": lambda: layers.add_then_normalize(
            tokens, norms[0], update, factors[0], norms[1], factors[1]
        ),
        "rotate": lambda: layers.rotate_normalized(*head_norms, query, key, rotations),
        "gate": lambda: layers.gate(Gives(opening), Gives(content), tokens, scale),
    }


class Gives(nn.Module):
    """A layer that gives a copy of what it holds, as a linear layer gives a tensor of its own."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held = held

    def forward(self, hidden: Tensor) -> Tensor:
        return self.held.clone()


def results(call: Callable[[], Any]) -> tuple[Tensor, ...]:
    result = call()
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("normalize", 1), ("add", 1), ("add and normalize", 1), ("rotate", 1), ("gate", 1), ("activate groups", 2),
        ("activate biased groups", 2), ("add pictures", 1), ("convolve", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_is_the_plain_expression(launches: list[str], dtype: str, name: str, count: int) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    call = calls(kind)[name]
    with using("off"):
        expected = results(call)
    assert launches == []
    with using("on"):
        first, second = results(call), results(call)
    assert len(launches) == 2 * count
    for value, again, reference in zip(first, second, expected, strict=True):
        assert torch.equal(value, again)
        assert value.dtype == reference.dtype
        assert torch.cosine_similarity(value.double().flatten(), reference.double().flatten(), dim=0).item() >= 0.99999
        difference = (value.double() - reference.double()).norm() / reference.double().norm()
        # torch rounds means and deviations of group norms to half precision, which the test below looks at.
        most = torch.finfo(kind).eps / (1 if name.startswith("activate") else 4)
        assert difference.item() <= (1e-6 if kind == torch.float32 else most)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_group_norms_are_nearer_than_torchs(dtype: str) -> None:
    """To the same in float64, rounded where both round: before SiLU and after."""
    kind: torch.dtype = getattr(torch, dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    picture = (2.0 * torch.randn(1, 128, 256, 256, generator=generator, device="cuda") + 1.0).to(kind)
    picture = picture.contiguous(memory_format=torch.channels_last)
    groups = nn.GroupNorm(32, 128, device="cuda", dtype=kind)
    exact = F.silu(copy.deepcopy(groups).double()(picture.double()).to(kind).double())
    errors = []
    for mode in ("on", "off"):
        with using(mode):
            errors.append((layers.activate(groups, picture).double() - exact).norm().item() / exact.norm().item())
    assert errors[0] <= torch.finfo(kind).eps / 4
    assert errors[0] < errors[1]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("channels", "side"), [(512, 128), (256, 256)])
def test_a_picture_is_made_twice_the_size(
    launches: list[str], dtype: str, channels: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one transposed convolution: near the module in float32, and the same bits each time."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    generator = torch.Generator("cuda").manual_seed(0)
    kind: torch.dtype = getattr(torch, dtype)
    module = Upsample2D(channels, use_conv=True).to("cuda", kind)
    hidden = torch.randn(1, channels, side, side, generator=generator, device="cuda").to(kind)
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    wide = copy.deepcopy(module).float()
    exact = wide(hidden.float())
    for layout in (torch.contiguous_format, torch.channels_last):
        module = module.to(memory_format=layout)
        launches.clear()
        with using("on"):
            first, second = (pictures.upsample(module, hidden) for _ in range(2))
        assert launches == 2 * ["spread_taps", "add_elements"]
        assert torch.equal(first, second)
        assert first.is_contiguous(memory_format=torch.channels_last)
        assert (first.float() - exact).norm() <= torch.finfo(kind).eps / 2 * exact.norm()
    launches.clear()
    with using("on"):
        pictures.upsample(wide, hidden.float())
    assert launches == []


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 88), (16, 8)])
def test_attention_between_pixels(dtype: str, height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the module in float32 as the module itself, without its attention, and the same bits each time."""
    torch.manual_seed(0)
    kind: torch.dtype = getattr(torch, dtype)
    module = Attention(
        512, heads=1, dim_head=512, eps=1e-6, norm_num_groups=32, residual_connection=True, bias=True
    ).to("cuda", kind)  # fmt: skip
    module.to_q.weight.mul_(4)  # so that pixels look at some more than at others
    hidden = torch.randn(1, 512, height, width, device="cuda").to(kind).contiguous(memory_format=torch.channels_last)
    exact, plain = copy.deepcopy(module).float()(hidden.float()), module(hidden)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with using("on"):
        first, second = attend(module, hidden), attend(module, hidden)
    assert torch.equal(first, second)
    assert first.is_contiguous(memory_format=torch.channels_last)
    errors = [((one.float() - exact).norm() / (exact - hidden.float()).norm()).item() for one in (first, plain)]
    assert errors[0] <= 1.2 * errors[1]


def forward(transformer: ZImageTransformer) -> Callable[[], Tensor]:
    """A picture of 512² with a caption; what is made once a picture is made."""
    generator = torch.Generator().manual_seed(0)
    shapes = (20, transformer.config.cap_feat_dim), (1, 16, 64, 64)
    features, latents = (torch.randn(*shape, generator=generator).cuda() for shape in shapes)
    caption = transformer.encode_caption(features)
    grid = transformer.grid(64, 64, caption.length)
    (modulation,) = transformer.modulations(torch.tensor([0.3], device="cuda"))
    return lambda: transformer.denoise(latents, caption, grid, modulation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_with_and_without(launches: list[str], dtype: Any) -> None:
    """By itself a pipeline on CUDA has them; at the released widths."""
    transformer = ZImagePipeline.from_diffusers(build_diffusers(size="wide", device="cuda", dtype=dtype)).transformer
    with using("off"):
        expected = forward(transformer)().double().flatten()
    assert launches == []
    result = forward(transformer)().double().flatten()
    blocks = len(transformer.context_refiner) + len(transformer.noise_refiner) + len(transformer.layers)
    assert len(launches) == 5 * blocks
    assert torch.cosine_similarity(result, expected, dim=0).item() >= 0.9999


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decode_with_and_without(folder: Path, launches: list[str], dtype: str) -> None:
    """The whole decoder stays in channels-last layout: every norm before an activation is fused,
    and biases are added by what comes next."""
    pipe = ZImagePipeline.from_pretrained(folder, device="cuda", dtype=dtype)
    latents = torch.randn(1, 16, 64, 48, generator=torch.Generator().manual_seed(0)).cuda()
    with using("off"):
        expected = pipe.autoencoder.decode(latents).float()
    assert launches == []
    result = pipe.autoencoder.decode(latents).float()
    decoder = pipe.autoencoder.vae.decoder
    residuals = sum(len(block.resnets) for block in (decoder.mid_block, *decoder.up_blocks))
    upsamplers = sum(len(block.upsamplers or ()) for block in decoder.up_blocks)
    counts = {"gather_groups": 2 * residuals + 1, "activate_groups": 2 * residuals + 1, "add_elements": residuals}
    if dtype != "float32":
        counts |= {"add_elements": residuals + upsamplers, "spread_taps": upsamplers}
    assert Counter(launches) == counts
    assert torch.cosine_similarity(result.flatten(), expected.flatten(), dim=0).item() >= 0.9999


def test_kernels_never_wait_for_the_device(folder: Path) -> None:
    step = forward(ZImagePipeline.from_pretrained(folder, device="cuda", dtype="bfloat16").transformer)
    with using("on"):
        step()
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(3):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_another_size_compiles_nothing() -> None:
    """Once a kernel has run, other numbers of tokens and batches need no compiler."""
    from zimage.kernels.rows import add_rows

    def compiled() -> int:
        return sum(len(cache[0]) for cache in add_rows.device_caches.values())

    def run(batch: int, tokens: int) -> None:
        stream = torch.ones(batch, tokens, DIM, device="cuda")
        fused.add_then_normalize(stream, stream, weight, factor, 1e-5, weight, factor, 1e-5)

    weight, factor = torch.ones(DIM, device="cuda"), torch.ones(1, 1, DIM, device="cuda")
    run(1, 96)
    before = compiled()
    for shape in ((1, 1), (1, 17), (1, TOKENS), (2, 64), (3, 65)):
        run(*shape)
    assert compiled() == before > 0


def test_a_tensor_that_starts_elsewhere_has_a_kernel_of_its_own() -> None:
    """One that was compiled for sixteen bytes at a time would read past its place, or fault."""
    weight = torch.randn(DIM, device="cuda")
    room = torch.randn(4 * DIM + 1, device="cuda")
    for _ in range(3):
        for start in (0, 1):
            rows = room[start : start + 4 * DIM].view(1, 4, DIM)
            made = fused.normalize(rows, weight, None, 1e-5)
            assert isinstance(made, Tensor)
            exact = rows.double() * (rows.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
            assert (made.double() - exact).norm() <= 1e-6 * exact.norm()
