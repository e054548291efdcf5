"""What a memory plan is: how much may be used, what sits where, and the peaks that this is predicted to have.

Plain data without torch. Knows nothing of how a plan is made (`planner`) or carried out (`residency`).
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..arrays import plain
from ..errors import RequestError
from .sizes import ModelSizes, Work

MARGIN, LEAST_MARGIN = 0.1, 1 << 30
"""Of a card's memory, what is left to its driver, to libraries' workspace and to gaps between blocks: a tenth, and at
least a GiB. Of the host's, a tenth."""

_LEAST = 10**6
"""Bytes below which the unit of a number without one was forgotten: no model fits in so few."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes that may be used: of the device, and of the host; `host` None where the device is the host itself.

    `name` is how it was asked for.
    """

    device: int
    host: int | None
    name: str = ""

    @classmethod
    def of_card(cls, total: int, host: int | None, name: str = "") -> Budget:
        """What is left of a card's `total` bytes after the margin, and of the `host`'s."""
        device = max(0, total - max(math.ceil(MARGIN * total), LEAST_MARGIN))
        return cls(device=device, host=None if host is None else host - math.ceil(MARGIN * host), name=name)

    @classmethod
    def of_host(cls, total: int, name: str = "") -> Budget:
        """What is left of `total` bytes for a device that is the host itself."""
        return cls(device=total - math.ceil(MARGIN * total), host=None, name=name)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Predicted peaks of a stage, in bytes; `host` are the weights that stay in the host's memory."""

    name: str
    device: int
    host: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What sits where.

    Args:
        text_encoder: "resident"; "streamed", layer by layer through the slots for each new prompt; or "cpu".
        resident_blocks: how many of the `blocks` that run in every step stay on the device.
        context_resident: whether the blocks that refine captions do; else they pass through the slots.
        slots: places that what is streamed passes through; 0 where nothing is.
        strip_levels: how many of the decoder's resolutions are computed in strips, 0 to 2.
        text_source, block_source: where what is streamed comes from: "memory" or, where the host has not enough of it,
            "files".
        weights: what the layers of text encoder and transformer are stored as, "bfloat16", "int8", "float8" or "nf4";
            None is the precision that they compute in. Modulations, embedders and the final layer always have that.
        quantize_activations: whether the transformer's layers round what they multiply to that as well; what this
            takes is within what products with widened weights take.
    """

    text_encoder: str
    resident_blocks: int
    blocks: int
    context_resident: bool
    slots: int
    strip_levels: int = 0
    text_source: str = "memory"
    block_source: str = "memory"
    weights: str | None = None
    quantize_activations: bool = False

    @property
    def streamed_blocks(self) -> int:
        return self.blocks - self.resident_blocks

    @property
    def text_waits(self) -> bool:
        """Whether the text encoder's layers wait somewhere else than on the device."""
        return self.text_encoder != "resident"

    @property
    def blocks_wait(self) -> bool:
        """Whether some of the transformer's blocks do."""
        return self.streamed_blocks > 0 or not self.context_resident

    @property
    def streamed(self) -> tuple[int, ...]:
        """Numbers of the blocks that are streamed, spread over the run: one is on its way while others compute.

        The first of the order of van der Corput (1935), in which numbers are sorted by their reversed bits: as even
        as any order whose next number leaves the ones before it where they are.
        """
        bits = max(1, (self.blocks - 1).bit_length())
        order = sorted(range(self.blocks), key=lambda number: int(f"{number:0{bits}b}"[::-1], 2))
        return tuple(sorted(order[: self.streamed_blocks]))

    def or_lower(self, other: Placement) -> Placement:
        """In each respect the more frugal of this and `other`; what passes through the device already still does."""
        return replace(
            other,
            text_encoder=other.text_encoder if self.text_encoder == "resident" else self.text_encoder,
            resident_blocks=min(self.resident_blocks, other.resident_blocks),
            context_resident=self.context_resident and other.context_resident,
            slots=max(self.slots, other.slots),
            strip_levels=max(self.strip_levels, other.strip_levels),
            text_source=self.text_source if self.text_waits else other.text_source,
            block_source=self.block_source if self.blocks_wait else other.block_source,
            quantize_activations=self.quantize_activations,
        )

    def __str__(self) -> str:
        parts = [
            f"text encoder {'on the CPU' if self.text_encoder == 'cpu' else self.text_encoder}",
            f"{self.resident_blocks} of {self.blocks} blocks resident"
            if self.streamed_blocks
            else "transformer resident",
            f"decode with {self.strip_levels} level{'s' * (self.strip_levels > 1)} in strips"
            if self.strip_levels
            else "decode whole",
        ]
        rounded = "weights and the transformer's activations" if self.quantize_activations else "weights"
        parts += [f"{rounded} in {self.weights}"] if self.weights else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A placement that was not taken, and why."""

    placement: Placement
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A placement that fits, what it is for, its predicted peaks, and what was rejected before it.

    `stepped_down` says for each time that memory ran out all the same what is done since; `measured` is the most that
    the device held since the process began, in bytes, less what it held before the model was loaded, where that is
    known. `attention` is the backend that attention runs with, where a pipeline has been made.
    """

    placement: Placement
    work: Work
    budget: Budget
    stages: tuple[Stage, ...]
    sizes: ModelSizes = field(repr=False)
    rejected: tuple[Rejected, ...] = ()
    stepped_down: tuple[str, ...] = ()
    measured: int | None = None
    attention: str = ""

    @property
    def device_peak(self) -> int:
        return max(stage.device for stage in self.stages)

    @property
    def host_peak(self) -> int:
        return max(stage.host for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the sizes as plain values for JSON."""
        plain = {**asdict(self), "device_peak": self.device_peak, "host_peak": self.host_peak}
        return {name: value for name, value in plain.items() if name != "sizes"}

    def __str__(self) -> str:
        lines = [f"{self.work.width}x{self.work.height}, {self.work.dtype}: {self.placement}"]
        lines += (
            [f"  layers as their files have them: {gib(self.sizes.packed)} in fewer bits"] if self.sizes.packed else []
        )
        lines += [f"  {stage.name}: {gib(stage.device)} on the device, {gib(stage.host)} on the host"
                  for stage in self.stages]  # fmt: skip
        lines += [] if self.measured is None else [f"  measured until now: at most {gib(self.measured)} on the device"]
        lines += [f"  attention: {self.attention}"] if self.attention else []
        lines += [f"  {sentence}" for sentence in self.stepped_down]
        return "\n".join(lines)


def parse_memory(text: str | int, name: str = "memory") -> int | None:
    """Bytes of "16GB", "12.5 GiB" or a number of bytes, a million at least; `None` for "auto". Raises `RequestError`
    for anything else, of which it speaks by `name`.

    GB are 10⁹ bytes and GiB 2³⁰, as cards are sold and as tools count.
    """
    text = plain(text)
    if text == "auto":
        return None
    if isinstance(text, int) and not isinstance(text, bool) and text >= _LEAST:
        return text
    written = str(text) if isinstance(text, str | int) and not isinstance(text, bool) else ""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMG]?i?B?)\s*", written, re.IGNORECASE)
    amount = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if amount < 1 or match is None:
        raise RequestError(f"{name} must be 'auto' or an amount like '16GB' or '12GiB', got {text!r}")
    if amount < _LEAST and not match[2]:
        unit = "GB" if amount < 1000 else "MB"
        raise RequestError(f"{name} must have a unit, got {text!r}, which is so many bytes; write '{match[1]}{unit}'")
    return int(amount)


def gib(count: int) -> str:
    """Bytes in GiB, as texts have them."""
    return f"{count / 2**30:.2f} GiB"
