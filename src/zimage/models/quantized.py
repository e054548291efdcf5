"""Linear layers whose weights take 2 to 16 bits: rounded row by row while they are loaded, or so in a file already, and
widened when they are used.

What comes in and goes out has the compute type, so a layer stands where the plain one stood. Meant are those of the
blocks, without modulations, embedders and the final layer, which are few and which images depend on most. Knows no
files and no plans.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..kernels.switch import run, wanted
from ..memory.sizes import NF4_BLOCK
from . import ggml, packed
from .rowwise import MOST, NARROW, Rows, has_product, multiplied, rounded

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen values of NF4: quantiles of a normal distribution (arXiv 2305.14314, appendix E)."""

NF4_PIECE = 2**22
"""Numbers of NF4 that are widened at a time."""

SKIPPED = ("adaLN_modulation",)
"""Parts of a block that keep the compute type."""

WIDE_BLOCKS = (("context_refiner", slice(None)), ("noise_refiner", slice(None)), ("layers", slice(-1, None)))
"""Blocks whose layers never round their input, by list and place in it. Captions are refined once for a picture, so
there is nothing to win. Of what rounded inputs add to the error of an evaluation (in squares), the last block alone
brings about half in the demo models, which have five, and in a run that was not kept the noise refiner more than half
on random weights; of the released models' work these are an eleventh. Of kinds of layers w2 brings most, in int8 half
as well, but it is a fifth of the work, and with these blocks left out less remains than without w2 (docs/memory.md).
Others who round Z-Image's blocks to int8 round all kinds (vllm-omni#1470, xDiT#729)."""

STORED = {**NARROW, "nf4": torch.uint8}
"""What the weights of each kind are stored as; of nf4 two to a byte."""


class StoredLinear(nn.Module):
    """A linear layer with the parameters of diffusers' or transformers' plain one, its `weight` stored as `kind`."""

    weight: nn.Parameter

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind, self.in_features, self.out_features = kind, linear.in_features, linear.out_features
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` (..., in) to (..., out); the weights are widened to its type for this one product."""
        return F.linear(hidden, self.widened(hidden.dtype), self.bias)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights (out, in) in `dtype`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """As torch prints it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class PackedLinear(StoredLinear):
    """Weights as a file has them, of one of `packed.KINDS`: `weight` (out, bytes) in uint8, scales among them."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        """In the place of `linear`, without values, on the meta device."""
        super().__init__(linear, kind)
        self.weight = _empty((self.out_features, packed.row_bytes(kind, self.in_features)), torch.uint8)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights (out, in) in `dtype`."""
        return packed.widen(self.weight, self.kind, dtype)


class NarrowLinear(StoredLinear):
    """Weights in bfloat16, `weight` (out, in): for float32, of a bfloat16 file the same numbers in half the bytes."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        """In the place of `linear`, without values, on the meta device."""
        super().__init__(linear, kind)
        self.weight = _empty((self.out_features, self.in_features), torch.bfloat16)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights (out, in) in `dtype`."""
        return self.weight.to(dtype)


class QuantizedLinear(StoredLinear):
    """A linear layer of `kind` "int8", "float8" or "nf4".

    `weight` (out, in) holds what is stored, of nf4 (out, in / 2); `scale` in float32 is what that is multiplied with:
    (out, 1), of nf4 (out, in / 64). `rows` is what it rounds its input to before a product, if it does: its `kind`.
    """

    def __init__(self, linear: nn.Linear, kind: str, rows: str | None = None) -> None:
        """In the place of `linear`, without values, on the meta device."""
        super().__init__(linear, kind)
        self.rows = rows
        count, columns = linear.weight.shape
        halved, groups = (columns // 2, columns // NF4_BLOCK) if kind == "nf4" else (columns, 1)
        self.weight = _empty((count, halved), STORED[kind])
        self.scale = _empty((count, groups), torch.float32)

    def forward(self, hidden: Rows) -> Tensor:
        """`hidden` (..., in) to (..., out): tokens, or the rows that they are rounded to."""
        rows = rounded(hidden, self.rows) if isinstance(hidden, Tensor) else hidden
        return (
            super().forward(rows) if isinstance(rows, Tensor) else multiplied(rows, self.weight, self.scale, self.bias)
        )

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weights (out, in) in `dtype`."""
        if self.kind != "nf4":
            fused: Tensor | None = None
            if wanted(self.weight):
                fused = run("rounding.widen", self.weight, self.scale, dtype)
            if fused is not None:
                return fused
            return self.weight.to(dtype).mul_(self.scale.to(dtype))
        levels = ggml.table(NF4_LEVELS, dtype, self.weight.device)
        rows = max(1, NF4_PIECE // self.in_features)
        parts = zip(self.weight.split(rows), self.scale.split(rows), strict=True)
        return torch.cat([_nf4_values(weight, scale, levels) for weight, scale in parts])


def quantize(module: nn.Module, kind: str, *blocks: str, activations: bool = False) -> None:
    """Replace the linear layers in the lists of blocks named `blocks` of a module that has no values yet.

    With `activations` they round their input too (`kind` "int8" or "float8"), but for those of `WIDE_BLOCKS`.
    """
    wide = {
        f"{name}.{number}"
        for name, part in WIDE_BLOCKS
        if name in blocks
        for number in range(len(getattr(module, name)))[part]
    }
    for path, layer in _plain_layers(module, blocks):
        if kind == "bfloat16":
            _replace(module, path, NarrowLinear(layer, kind))
        elif fits(layer, kind):
            rows = kind if activations and ".".join(path.split(".")[:2]) not in wide else None
            _replace(module, path, QuantizedLinear(layer, kind, rows))


def pack(module: nn.Module, kinds: Mapping[str, str], *blocks: str) -> None:
    """Replace those linear layers in the lists of blocks named `blocks` whose `weight` a file has as one of `kinds`."""
    for path, layer in _plain_layers(module, blocks):
        kind = kinds.get(f"{path}.weight")
        if kind in packed.KINDS:
            _replace(module, path, PackedLinear(layer, kind))


def packed_as(*modules: nn.Module) -> str | None:
    """What layers of `modules` are that stay as their file has them: "gguf", "fp8" or "gguf+fp8"."""
    kinds = {one.kind for module in modules for one in module.modules() if isinstance(one, PackedLinear)}
    names = {"gguf": kinds - packed.FLOATS.keys(), "fp8": kinds & packed.FLOATS.keys()}
    return "+".join(name for name, found in names.items() if found) or None


Module = TypeVar("Module", bound=nn.Module)


def quantized_copy(module: Module, kind: str, *blocks: str, activations: bool = False) -> Module:
    """`module`, which has its values, with layers stored as by `quantize`; its other parameters and the modules outside
    of `blocks` are shared with it."""
    kept: list[object] = [*module.parameters(), *module.buffers()]
    kept += [child for name, child in module.named_children() if name not in blocks]
    copied = copy.deepcopy(module, {id(one): one for one in kept})
    quantize(copied, kind, *blocks, activations=activations)
    for path, layer in copied.named_modules():
        if isinstance(layer, QuantizedLinear) and layer.weight.is_meta:
            stored = quantize_rows(module.get_parameter(f"{path}.weight").detach(), kind)
            layer.weight, layer.scale = (nn.Parameter(one, requires_grad=False) for one in stored)
    return copied


def widening(module: nn.Module, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Of the layers of `module` that round activations, how many widen them again on `device`, and how many are."""
    layers = [one for one in module.modules() if isinstance(one, QuantizedLinear) and one.rows is not None]
    widened = [one for one in layers if not has_product(one.kind, dtype, one.weight.shape, device)]
    return len(widened), len(layers)


def _plain_layers(module: nn.Module, blocks: tuple[str, ...]) -> list[tuple[str, nn.Linear]]:
    """The linear layers of blocks that may be stored in fewer bits, by their names in the module."""
    return [
        (f"{name}.{number}.{path}", layer)
        for name in blocks
        for number, block in enumerate(getattr(module, name))
        for path, layer in block.named_modules()
        if type(layer) is nn.Linear and not path.startswith(SKIPPED)
    ]


def _replace(module: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(owner), leaf, layer)


def fits(layer: nn.Linear, kind: str) -> bool:
    """Whether the rows of a layer can be stored so: those of nf4 are blocks of 64."""
    return kind != "nf4" or layer.in_features % NF4_BLOCK == 0


def quantize_rows(rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Stored weights and scales of some rows (n, in) of a weight; each row, of nf4 each block, has a scale of its own.

    Scales of int8 and float8 are rounded to bfloat16, so that they are the same in every compute type but float16.
    """
    wide = rows.float()
    if kind == "nf4":
        return _nf4(wide)
    most = MOST[kind]
    scale = (wide.abs().amax(dim=1, keepdim=True) / most).bfloat16().float()
    scaled = (wide / torch.where(scale > 0, scale, 1.0)).clamp_(-most, most)
    return (scaled.round_() if kind == "int8" else scaled).to(STORED[kind]), scale


def _nf4(wide: Tensor) -> tuple[Tensor, Tensor]:
    blocks = wide.unflatten(1, (-1, NF4_BLOCK))  # (n, in / 64, 64)
    scale = blocks.abs().amax(dim=2)
    scaled = blocks / torch.where(scale > 0, scale, 1.0)[..., None]
    nearest = _nearest(scaled.flatten(1))
    return (nearest[:, 0::2] << 4) | nearest[:, 1::2], scale


def _nearest(scaled: Tensor) -> Tensor:
    """The numbers in uint8 of the levels nearest to what is in `scaled`, [-1, 1], and of two as near the lower one's.

    Each of 256 intervals has at most one of the boundaries between two levels: a look at a table and one comparison.
    """
    levels = torch.tensor(NF4_LEVELS, device=scaled.device)
    between = (levels[1:] + levels[:-1]) / 2
    places = _interval(between)
    lowest = torch.searchsorted(places, torch.arange(256, device=scaled.device, dtype=places.dtype)).to(torch.uint8)
    bound = torch.full((256,), math.inf, device=scaled.device).index_copy(0, places.long(), between)
    flat = scaled.flatten()
    at = _interval(flat)
    return lowest.index_select(0, at).add_(flat > bound.index_select(0, at)).view(scaled.shape)


def _interval(scaled: Tensor) -> Tensor:
    """Which of 256 a value in [-1, 1] is in; never falls as values grow, so comparing is exact within one."""
    return ((scaled + 1.0) * 127.5).int().clamp_(0, 255)


def _nf4_values(weight: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Rows (n, in) of what is stored in `weight` (n, in / 2), in the type of `levels`.

    Looked up by the byte, so two numbers at a time, as a word that is as wide as both.
    """
    word = torch.int64 if levels.itemsize == 4 else torch.int32
    words = torch.cartesian_prod(levels, levels).view(word).squeeze(1)  # (256,)
    values = words.index_select(0, weight.flatten().int()).view(levels.dtype)
    return values.view(*scale.shape, NF4_BLOCK).mul_(scale.to(levels.dtype)[..., None]).flatten(1)


def _empty(shape: tuple[int, int], dtype: torch.dtype) -> nn.Parameter:
    assert math.prod(shape)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
