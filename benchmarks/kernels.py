"""Each fused kernel beside the torch expression it replaces, on a CUDA device at the released models' widths.

A picture of 1024² with 128 tokens of caption: 4224 tokens of 3840 channels, feed-forward 10240. For each: the median
time of a call, and the bytes that must be read and written divided by it, beside what a plain copy of the residual
stream moves. Bytes are those of a single pass, so that an expression of many passes shows fewer a second. Then the same
kernels where they round to 8 bits, and matrix products and, on Hopper's cards, attention of 8-bit numbers beside those
of the type itself (`torch`), each with all that it takes from rounded rows to a result in the type. `--output` writes
the table as JSON into a folder.

    python benchmarks/kernels.py [--dtypes bfloat16,float16] [--tokens 4224] [--rounds 50] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from zimage.bench.report import write
from zimage.kernels.switch import using
from zimage.models import layers, pictures
from zimage.models.attention import attend_in_float8
from zimage.models.pixel_attention import attend
from zimage.models.precision import DTYPES, overflow_scale, residual_dtype
from zimage.models.quantized import quantize_rows
from zimage.models.rowwise import Quantized, has_product, multiplied, rounded, scaled

DIM, HEADS, HIDDEN = 3840, 30, 10240
KINDS = ("int8", "float8")
SHAPES = ((DIM, DIM), (HIDDEN, DIM), (DIM, HIDDEN))
"""Rows and columns of the weights: attention's, gate and content, and what brings their product back."""
PICTURE = (128, 1024, 1024)
"""Channels, height and width of the image decoder's finest level; the kernel reads it twice. The level before has twice
the channels, and half of each side until it is made larger."""
MIDDLE = (512, 128, 128)
"""Of the level where all pixels see each other."""
WARM_UP = 5
FLOOD = 1 << 30
"""Bytes that are written between two calls: more than any cache holds."""
Case = tuple[Callable[[], Any], int]
"""A call and the bytes that it must move."""


def main() -> None:
    """Measure every kernel in every type and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float16")
    parser.add_argument("--tokens", type=int, default=4096 + 128)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py measures on a CUDA device, and torch finds none here")
    rows = []
    for name in arguments.dtypes.split(","):
        for row in measure(DTYPES[name], arguments.tokens, arguments.rounds):
            rows.append({"dtype": name, **row})
            print(line(rows[-1]), flush=True)
    if arguments.output:
        keep(rows, arguments.tokens, arguments.output)


@torch.no_grad()
def measure(dtype: torch.dtype, tokens: int, rounds: int) -> Iterable[dict[str, Any]]:
    """A row for the copy and for each kernel."""
    source = torch.randn(1, tokens, DIM, device="cuda").to(residual_dtype(dtype))
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    yield row_of("copy", copied, {"torch": median_time(lambda: target.copy_(source), rounds)})
    for name, (call, moved) in (cases(dtype, tokens) | rounding_cases(dtype, tokens)).items():
        times = {}
        for side, mode in (("torch", "off"), ("fused", "on")):
            with using(mode):
                times[side] = median_time(call, rounds)
        yield row_of(name, moved, times)
    for kind in KINDS:
        for rows, columns in SHAPES:
            yield product_row(kind, dtype, tokens, rows, columns, rounds)
    if torch.cuda.get_device_capability() == (9, 0):
        yield attention_row(dtype, tokens, rounds)


def product_row(kind: str, dtype: torch.dtype, tokens: int, rows: int, columns: int, rounds: int) -> dict[str, Any]:
    """A product with a weight (rows, columns) in `kind`, beside a plain one and one with weights alone in `kind`."""
    hidden, wide = noise(1, tokens, columns, dtype=dtype), noise(rows, columns)
    weight, scale = quantize_rows(wide, kind)
    narrow, plain = rounded(hidden, kind), wide.to(dtype)
    assert isinstance(narrow, Quantized)
    times = {
        "torch": median_time(lambda: F.linear(hidden, plain), rounds),
        "weights": median_time(lambda: F.linear(hidden, weight.to(dtype).mul_(scale.to(dtype))), rounds),
        "fused": median_time(lambda: multiplied(narrow, weight, scale, None), rounds),
    }
    moved = tokens * (columns + rows * dtype.itemsize) + rows * columns
    by = "the card's" if has_product(kind, dtype, weight.shape, weight.device) else "widened"
    return {**row_of(f"{kind} {columns} to {rows}", moved, times), "product": by}


def attention_row(dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, Any]:
    """Attention of rounded queries and keys, which rounds values, beside torch's own."""
    plain = [noise(1, tokens, HEADS, DIM // HEADS, dtype=dtype) for _ in range(3)]
    norms, angles = (norm(DIM // HEADS, dtype), norm(DIM // HEADS, dtype)), noise(1, tokens, DIM // HEADS // 2)
    turns = torch.polar(torch.ones_like(angles), angles)
    narrow = layers.rotate_normalized(*norms, *plain[:2], turns, "float8")
    assert isinstance(narrow[0], Quantized)
    times = {
        "torch": median_time(lambda: F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in plain)), rounds),
        "fused": median_time(lambda: attend_in_float8(*narrow, plain[2]), rounds),
    }
    return row_of("attention float8", tokens * DIM * (2 + 2 * dtype.itemsize), times)


def rounding_cases(dtype: torch.dtype, tokens: int) -> dict[str, Case]:
    """What a block that rounds its activations does between its matrix products in place of some of `cases`."""
    wide, item, row = residual_dtype(dtype), dtype.itemsize, tokens * DIM
    stream, update = noise(1, tokens, DIM, dtype=wide), noise(1, tokens, DIM, dtype=wide)
    factor, norms = noise(1, 1, DIM, dtype=dtype), (norm(DIM, dtype), norm(DIM, dtype))
    mixed = noise(1, tokens, DIM, dtype=dtype)
    opening, content = Gives(noise(1, tokens, HIDDEN, dtype=dtype)), Gives(noise(1, tokens, HIDDEN, dtype=dtype))
    product, scales = (1e5 * noise(tokens, HIDDEN)).int(), (noise(tokens, 1), noise(HIDDEN, 1))
    heads = [noise(1, tokens, HEADS, DIM // HEADS, dtype=dtype) for _ in range(2)]
    head_norms, angles = (norm(DIM // HEADS, dtype), norm(DIM // HEADS, dtype)), noise(1, tokens, DIM // HEADS // 2)
    rotations = torch.polar(torch.ones_like(angles), angles)
    found: dict[str, Case] = {
        "rotate float8": (
            lambda: layers.rotate_normalized(*head_norms, *heads, rotations, "float8"),
            row * 2 * (item + 1) + tokens * DIM // HEADS * 4,
        )
    }
    for kind in KINDS:
        found |= {
            f"normalize {kind}": (
                lambda kind=kind: layers.normalize(norms[0], stream, factor, kind), row * (wide.itemsize + 1),
            ),
            f"add, norm. {kind}": (
                lambda kind=kind: layers.add_then_normalize(stream, norms[0], update, factor, norms[1], factor, kind),
                row * (3 * wide.itemsize + 1),
            ),
            f"gate {kind}": (
                lambda kind=kind: layers.gate(opening, content, stream, overflow_scale(dtype), kind),
                tokens * HIDDEN * (2 * item + 1),
            ),
            f"round {kind}": (lambda kind=kind: rounded(mixed, kind), row * (item + 1)),
        }  # fmt: skip
    found["scale int32"] = (lambda: scaled(product, *scales, None, dtype), tokens * HIDDEN * (4 + item))
    return found


def cases(dtype: torch.dtype, tokens: int) -> dict[str, Case]:
    """What a block does between its matrix products."""
    wide = residual_dtype(dtype)
    stream, update = noise(1, tokens, DIM, dtype=wide), noise(1, tokens, DIM, dtype=wide)
    factors, norms = (
        (noise(1, 1, DIM, dtype=dtype), noise(1, 1, DIM, dtype=dtype)),
        (norm(DIM, dtype), norm(DIM, dtype)),
    )
    packed = noise(1, tokens, 3, HEADS, DIM // HEADS, dtype=dtype)
    head_norms = norm(DIM // HEADS, dtype), norm(DIM // HEADS, dtype)
    angles = noise(1, tokens, DIM // HEADS // 2)
    rotations = torch.polar(torch.ones_like(angles), angles)
    apart = [packed[:, :, number].contiguous() for number in range(2)]
    opening, content = Gives(noise(1, tokens, HIDDEN, dtype=dtype)), Gives(noise(1, tokens, HIDDEN, dtype=dtype))
    row, item = tokens * DIM, dtype.itemsize
    picture = noise(1, *PICTURE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    other, bias = torch.zeros_like(picture), torch.zeros(PICTURE[0], device="cuda", dtype=dtype)
    groups = nn.GroupNorm(32, PICTURE[0], device="cuda", dtype=dtype)
    before = 2 * PICTURE[0], PICTURE[1] // 2, PICTURE[2] // 2
    enlarger = Upsample2D(before[0], use_conv=True).to("cuda", dtype)
    smaller = noise(1, *before, dtype=dtype).contiguous(memory_format=torch.channels_last)
    middle = noise(1, *MIDDLE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    between = Attention(
        MIDDLE[0], heads=1, dim_head=MIDDLE[0], norm_num_groups=32, residual_connection=True, bias=True
    ).to("cuda", dtype)
    return {
        "activate groups": (lambda: layers.activate(groups, picture), picture.numel() * 3 * item),
        "add pictures": (lambda: pictures.add(picture, bias, other, bias), picture.numel() * 3 * item),
        "upsample": (lambda: pictures.upsample(enlarger, smaller), smaller.numel() * 5 * item),
        "attend, pixels": (lambda: attend(between, middle), middle.numel() * 2 * item),
        "normalize": (lambda: layers.normalize(norms[0], stream, factors[0]), row * (wide.itemsize + item)),
        "add": (lambda: layers.add_normalized(stream, norms[0], update, factors[0]), row * 3 * wide.itemsize),
        "add, normalize": (
            lambda: layers.add_then_normalize(stream, norms[0], update, factors[0], norms[1], factors[1]),
            row * (3 * wide.itemsize + item),
        ),
        "rotate": (
            lambda: layers.rotate_normalized(*head_norms, *apart, rotations),
            row * 4 * item + tokens * DIM // HEADS * 4,
        ),
        "rotate, packed": (
            lambda: layers.rotate_normalized(*head_norms, packed[:, :, 0], packed[:, :, 1], rotations),
            row * 4 * item + tokens * DIM // HEADS * 4,
        ),
        "gate": (
            lambda: layers.gate(opening, content, stream, overflow_scale(dtype)),
            tokens * HIDDEN * 3 * item,
        ),
    }


class Gives(nn.Module):
    """A layer that takes no time: it gives what it holds, which the gate writes over."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held = held

    def forward(self, hidden: Tensor) -> Tensor:
        return self.held


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def norm(width: int, dtype: torch.dtype) -> RMSNorm:
    layer = RMSNorm(width, eps=1e-5)
    layer.weight = nn.Parameter(noise(width, dtype=dtype), requires_grad=False)
    return layer


def median_time(call: Callable[[], Any], rounds: int) -> float:
    """Seconds on the device of one call whose tensors have left the cache. Filling it with something else before each
    call takes longer than launching the call, so that no time is spent waiting for the host."""
    flood = torch.empty(FLOOD, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UP):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in marks:
        flood.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1000


def row_of(name: str, moved: int, times: dict[str, float]) -> dict[str, Any]:
    rates = {f"{side}_bytes_per_s": moved / seconds for side, seconds in times.items()}
    return {"name": name, "bytes": moved, **{f"{side}_s": seconds for side, seconds in times.items()}, **rates}


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    said = f"{row['dtype']:>8}  {row['name']:<20}{row['bytes'] / 1e6:7.1f} MB"
    for side in ("torch", "weights", "fused"):
        if f"{side}_s" in row:
            said += f"  {side} {row[f'{side}_s'] * 1e6:7.1f} us {row[f'{side}_bytes_per_s'] / 1e9:6.0f} GB/s"
    return said + (f"  {row['torch_s'] / row['fused_s']:.2f} x" if "fused_s" in row else "")


def keep(rows: list[dict[str, Any]], tokens: int, folder: Path) -> None:
    """The table as JSON, with device and versions."""
    import triton

    report = {
        "machine": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tokens": tokens,
        "rows": rows,
    }
    print(f"wrote {write(report, folder, f'kernels-cuda-{date.today()}')}")


if __name__ == "__main__":
    main()
