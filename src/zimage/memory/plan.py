"""Where the parts of a model sit while a picture is made, so that it fits: sizes and a budget in, a `Plan` out.

Plans are tried from the fastest to the most frugal, and the first that fits is taken; those before it are kept with the
reason why not. Pure arithmetic, no torch. Knows nothing of how a plan is carried out (`residency`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import NotEnoughMemory, RequestError
from .sizes import ModelSizes, Work, decode_activations, denoise_activations, text_activations

SLOTS = 2
"""Places on the device that streamed layers pass through: one computes while the other is filled."""
STRIP_LEVELS = (1, 2)
"""How many of the decoder's resolutions may be computed in strips: each halves what a decode needs, or better."""
STAGING = 32 << 20
"""Bytes of host memory that weights pass through on their way from a file."""
MARGIN, LEAST_MARGIN = 0.1, 1 << 30
"""Of a card's memory, what is left to its driver, to libraries' workspace and to gaps between blocks: a tenth, and at
least a GiB. Of the host's, a tenth."""

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
    """

    text_encoder: str
    resident_blocks: int
    blocks: int
    context_resident: bool
    slots: int
    strip_levels: int = 0
    text_source: str = "memory"
    block_source: str = "memory"

    @property
    def streamed_blocks(self) -> int:
        return self.blocks - self.resident_blocks

    @property
    def streamed(self) -> tuple[int, ...]:
        """Numbers of the blocks that are streamed, spread evenly: one is on its way while those before it compute."""
        count = self.streamed_blocks
        return tuple(
            number
            for number in range(self.blocks)
            if (number + 1) * count // self.blocks > number * count // self.blocks
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
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A placement that was not taken, and why."""

    placement: Placement
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A placement that fits, what it is for, its predicted peaks, and what was rejected before it."""

    placement: Placement
    work: Work
    budget: Budget
    stages: tuple[Stage, ...]
    sizes: ModelSizes = field(repr=False)
    rejected: tuple[Rejected, ...] = ()

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
        lines += [f"  {stage.name}: {gib(stage.device)} on the device, {gib(stage.host)} on the host"
                  for stage in self.stages]  # fmt: skip
        return "\n".join(lines)


def make_plan(sizes: ModelSizes, work: Work, budget: Budget, *, text_encoder: str | None = None) -> Plan:
    """The first placement that fits `budget`; `text_encoder` fixes where that is (see `Placement`).

    Raises `NotEnoughMemory` naming what would fit, `RequestError` for a wrong `text_encoder`.
    """
    if text_encoder not in (None, "resident", "streamed", "cpu"):
        raise RequestError(f"text_encoder must be 'resident', 'streamed' or 'cpu', got {text_encoder!r}")
    rejected: list[Rejected] = []
    for placement in _placements(sizes, work, budget, text_encoder):
        chosen, reason = _with_source(sizes, work, budget, placement)
        if not reason:
            stages = predict(sizes, work, budget, chosen)
            return Plan(
                placement=chosen, work=work, budget=budget, stages=stages, sizes=sizes, rejected=tuple(rejected)
            )
        rejected.append(Rejected(placement=chosen, reason=reason))
    raise NotEnoughMemory(_too_little(sizes, work, budget, rejected[-1]))


def plan_model(sizes: ModelSizes, dtype: str, budget: Budget) -> Plan:
    """The plan for pictures of the size that the model was trained on or, where that does not fit, of a smaller one.

    Raises `NotEnoughMemory` where not even a quarter of the side fits.
    """
    refusal = None
    for side in (sizes.native_side, sizes.native_side // 2, sizes.native_side // 4):
        try:
            return make_plan(sizes, Work(height=side, width=side, dtype=dtype), budget)
        except NotEnoughMemory as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def follow(plan: Plan, sizes: ModelSizes, dtype: str) -> Plan:
    """`plan` with the peaks of a model of these sizes; `RequestError` if it was made for another."""
    if plan.placement.blocks != len(sizes.blocks):
        raise RequestError(
            f"the plan is for a model of {plan.placement.blocks} blocks and this one has {len(sizes.blocks)}; make one "
            "from this model's sizes"
        )
    work = replace(plan.work, dtype=dtype)
    return replace(plan, work=work, sizes=sizes, stages=predict(sizes, work, plan.budget, plan.placement))


def fit_picture(plan: Plan, height: int, width: int, tokens: int) -> Plan:
    """`plan` for one picture: what sits where stays, and as few of the decoder's levels as it needs are in strips.

    Raises `NotEnoughMemory` where it does not fit and the budget is an amount; of what is free by itself the most
    frugal decode is tried.
    """
    work, reason = replace(plan.work, height=height, width=width, tokens=tokens), ""
    for levels in (0, *(levels for levels in STRIP_LEVELS if levels < len(plan.sizes.vae_channels))):
        placement = replace(plan.placement, strip_levels=levels)
        stages = predict(plan.sizes, work, plan.budget, placement)
        plan = replace(plan, work=work, placement=placement, stages=stages)
        reason = _reason(stages, plan.budget)
        if not reason:
            return plan
    if plan.budget.name == "auto":
        return plan
    amount = plan.budget.name or "the budget"
    raise NotEnoughMemory(
        f"{width}x{height} does not fit in {amount}: {reason}; choose a smaller size, or load with more memory"
    )


def predict(sizes: ModelSizes, work: Work, budget: Budget, placement: Placement) -> tuple[Stage, ...]:
    """Peaks while the prompt is encoded, in the denoising steps, and while the picture is decoded."""
    item, streams_text = work.itemsize, placement.text_encoder == "streamed"
    slot = max(
        max(sizes.text_layers) if streams_text else 0,
        max(sizes.blocks) if placement.streamed_blocks else 0,
        0 if placement.context_resident else max(sizes.context_blocks, default=0),
    )
    resident = sizes.transformer_rest + sizes.vae + placement.slots * slot
    resident += sum(sizes.blocks) - sum(sizes.blocks[number] for number in placement.streamed)
    resident += sum(sizes.context_blocks) if placement.context_resident else 0
    resident += sizes.text_encoder if placement.text_encoder == "resident" else 0
    kept = _kept_on_host(sizes, work, placement)
    if budget.host is None:  # the device is the host, which looks tokens up itself
        resident += sizes.text_rest if streams_text else 0
        kept = 0
    prompt = 0 if placement.text_encoder == "cpu" else text_activations(sizes, work)
    needs = {
        "prompt": prompt,
        "denoising": denoise_activations(sizes, work),
        "decoding": decode_activations(sizes, work, placement.strip_levels),
    }
    return tuple(Stage(name=name, device=resident * item + need, host=kept) for name, need in needs.items())


def _kept_on_host(sizes: ModelSizes, work: Work, placement: Placement) -> int:
    """Bytes of weights that stay in the host's memory. It looks tokens up, so their embedding always does."""
    text = blocks = 0
    if placement.text_encoder != "resident":
        text = sizes.text_encoder if placement.text_source == "memory" else sizes.text_rest
    if placement.block_source == "memory":
        blocks = sum(sizes.blocks[number] for number in placement.streamed)
        blocks += 0 if placement.context_resident else sum(sizes.context_blocks)
    is_staged = placement.slots > 0 or placement.text_encoder == "cpu"
    return (text + blocks) * work.itemsize + (STAGING if is_staged else 0)


def parse_memory(text: str | int) -> int | None:
    """Bytes of "16GB", "12.5 GiB" or a number of bytes; `None` for "auto". Raises `RequestError` for anything else.

    GB are 10⁹ bytes and GiB 2³⁰, as cards are sold and as tools count.
    """
    if text == "auto":
        return None
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([KMG]?i?B?)\s*", text, re.IGNORECASE) if isinstance(
        text, str
    ) else None  # fmt: skip
    amount = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if amount < 1:
        raise RequestError(f"memory must be 'auto' or an amount like '16GB' or '12GiB', got {text!r}")
    return int(amount)


def gib(count: int) -> str:
    """Bytes in GiB, as texts have them."""
    return f"{count / 2**30:.2f} GiB"


def _placements(sizes: ModelSizes, work: Work, budget: Budget, text_encoder: str | None) -> Iterator[Placement]:
    """From the fastest to the most frugal. Strips change bits of the picture, if little, and come last."""
    count = len(sizes.blocks)
    everything = Placement(
        text_encoder="resident", resident_blocks=count, blocks=count, context_resident=True, slots=0
    )  # fmt: skip
    places = [text_encoder] if text_encoder else ["resident", "streamed"]
    if "resident" in places:
        yield everything
    for levels in (0, *(levels for levels in STRIP_LEVELS if levels < len(sizes.vae_channels))):
        for place in places:
            whole = replace(
                everything, text_encoder=place, slots=SLOTS if place == "streamed" else 0, strip_levels=levels
            )
            if whole != everything:
                yield whole
            if place == places[-1] and budget.host is not None:
                yield _most_resident(sizes, work, budget, replace(whole, slots=SLOTS, context_resident=False))


def _most_resident(sizes: ModelSizes, work: Work, budget: Budget, placement: Placement) -> Placement:
    """With as many blocks on the device as fit there, at least none and not all."""
    none = replace(placement, resident_blocks=0)
    room = budget.device - max(stage.device for stage in predict(sizes, work, budget, none))
    fit = min(max(0, room // (max(sizes.blocks) * work.itemsize)), placement.blocks - 1)
    return replace(none, resident_blocks=fit)


def _with_source(sizes: ModelSizes, work: Work, budget: Budget, placement: Placement) -> tuple[Placement, str]:
    """The placement with as much of its weights in the host's memory as fits, and why it does not fit, "" if it does.

    Blocks come first: they are needed in every step, the text encoder once for each new prompt.
    """
    sources = [("memory", "memory"), ("files", "memory"), ("files", "files")]
    if not placement.slots and placement.text_encoder != "cpu":
        sources = sources[:1]
    elif budget.host is None:
        sources = sources[-1:]
    reason = ""
    for text, blocks in sources:
        placement = replace(placement, text_source=text, block_source=blocks)
        reason = _reason(predict(sizes, work, budget, placement), budget)
        if not reason:
            break
    return placement, reason


def _reason(stages: tuple[Stage, ...], budget: Budget) -> str:
    worst = max(stages, key=lambda stage: stage.device)
    if worst.device > budget.device:
        return f"{worst.name} needs {gib(worst.device)} of the device and {gib(budget.device)} may be used"
    host = max(stage.host for stage in stages)
    if budget.host is not None and host > budget.host:
        return f"{gib(host)} of the host's memory are needed and {gib(budget.host)} may be used"
    return ""


def _too_little(sizes: ModelSizes, work: Work, budget: Budget, last: Rejected) -> str:
    size = f"{work.width}x{work.height}"
    side = max(work.height, work.width)
    while (side := side // 2 // 16 * 16) >= 256:
        ratio = side / max(work.height, work.width)
        height, width = (max(16, round(pixels * ratio / 16) * 16) for pixels in (work.height, work.width))
        smaller = replace(work, height=height, width=width)
        if any(not _with_source(sizes, smaller, budget, one)[1] for one in _placements(sizes, smaller, budget, None)):
            return f"{size} does not fit: even with {last.placement}, {last.reason}; {width}x{height} would fit"
    return f"{size} does not fit, nor does a smaller picture: even with {last.placement}, {last.reason}"
