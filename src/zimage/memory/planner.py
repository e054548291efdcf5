"""Makes memory plans: from a model's sizes, a picture's and a budget the fastest placement that fits.

Placements are tried from the fastest to the most frugal, and the first that fits is taken; those before it are kept
with the reason why not. Pure arithmetic, no torch. Knows nothing of how a plan is carried out (`residency`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..errors import NotEnoughMemory, RequestError
from .peaks import layers_of, predict, stage_needs
from .plan import Budget, Placement, Plan, Rejected, Stage, gib
from .sizes import STORED_BYTES, Demands, ModelSizes, Work

SLOTS = 2
"""Places on the device that streamed layers pass through: one computes while the other is filled."""
STRIP_LEVELS = (1, 2)
"""How many of the decoder's resolutions may be computed in strips: each halves what a decode needs, or better."""
FULL, EXACT, FALLBACK = "full", "bfloat16", "int8"
"""How weights are asked for in the compute type; what they are stored as for float32 where the files are so and it does
not fit, which changes nothing; and where nothing fits at all."""
WITH_ACTIVATIONS = ("int8", "float8")
"""What weights must be stored as for activations to be rounded to it too: what devices have products of."""
ENCODINGS = ("resident", "streamed", "cpu")
"""Where a text encoder can be."""
STEP_DOWN = 0.95
"""Of what a stage was predicted to need and did not get, what the next rung may use."""


def make_plan(
    sizes: ModelSizes,
    work: Work,
    budget: Budget,
    *,
    text_encoder: str | None = None,
    weights: str | None = None,
    quantize_activations: bool = False,
) -> Plan:
    """The first placement that fits `budget`; `text_encoder` fixes where that is (see `Placement`).

    `weights` fixes what layers are stored as: "bfloat16", "int8", "float8", "nf4", or "full" for the compute type;
    without it they are in full, or as `_choices` has it. `quantize_activations` goes into the placement. Raises
    `NotEnoughMemory` naming what would fit, `RequestError` for wrong options.
    """
    check_weights(weights, quantize_activations)
    if text_encoder not in (None, *ENCODINGS):
        raise RequestError(f"text_encoder must be 'resident', 'streamed' or 'cpu', got {text_encoder!r}")
    rejected: list[Rejected] = []
    for choice in _choices(sizes, work, budget, text_encoder, weights):
        placement = replace(choice, quantize_activations=quantize_activations)
        chosen, reason = _with_source(sizes, work, budget, placement)
        if not reason:
            stages = predict(sizes, work, budget, chosen)
            return Plan(
                placement=chosen, work=work, budget=budget, stages=stages, sizes=sizes, rejected=tuple(rejected)
            )
        rejected.append(Rejected(placement=chosen, reason=reason))
    raise NotEnoughMemory(_too_little(sizes, work, budget, rejected[-1], weights))


def check_weights(weights: str | None, quantize_activations: bool = False) -> None:
    """Raises `RequestError` for what weights cannot be stored as, or cannot be where activations are rounded too."""
    if weights not in (None, FULL, *STORED_BYTES):
        known = ", ".join([FULL, *STORED_BYTES])
        raise RequestError(f"weight_dtype must be {known}, or left out; got {weights!r}")
    if quantize_activations and weights not in WITH_ACTIVATIONS:
        wanted = " or ".join(f"weight_dtype={kind!r}" for kind in WITH_ACTIVATIONS)
        got = "it was left out" if weights is None else f"got {weights!r}"
        raise RequestError(f"quantize_activations=True needs {wanted}, {got}; or leave quantize_activations=True out")


def plan_model(
    sizes: ModelSizes, dtype: str, budget: Budget, *, weights: str | None = None, quantize_activations: bool = False
) -> Plan:
    """The plan for pictures of the size that the model was trained on or, where that does not fit, of a smaller one.

    Raises `NotEnoughMemory` where not even a quarter of the side fits.
    """
    refusal = None
    for side in (sizes.native_side, sizes.native_side // 2, sizes.native_side // 4):
        try:
            work = Work(height=side, width=side, dtype=dtype)
            return make_plan(sizes, work, budget, weights=weights, quantize_activations=quantize_activations)
        except NotEnoughMemory as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def everything_resident(sizes: ModelSizes, dtype: str, budget: Budget) -> Plan:
    """The plan of a model that is on the device already, whether it should or not."""
    work, placement = Work(height=sizes.native_side, width=sizes.native_side, dtype=dtype), _everything(sizes)
    stages = predict(sizes, work, budget, placement)
    return Plan(placement=placement, work=work, budget=budget, stages=stages, sizes=sizes)


def follow(plan: Plan, sizes: ModelSizes, dtype: str) -> Plan:
    """`plan` with the peaks of a model of these sizes; `RequestError` if it was made for another."""
    if plan.placement.blocks != len(sizes.blocks):
        raise RequestError(
            f"the plan is for a model of {plan.placement.blocks} blocks and this one has {len(sizes.blocks)}; make one "
            "from this model's sizes"
        )
    work = replace(plan.work, dtype=dtype)
    return replace(plan, work=work, sizes=sizes, stages=predict(sizes, work, plan.budget, plan.placement))


def fit_picture(
    plan: Plan,
    height: int,
    width: int,
    tokens: int,
    from_image: bool = False,
    together: int | None = None,
    least_strips: int = 0,
) -> tuple[Plan, str]:
    """`plan` for one picture, and why it does not fit, "" if it does.

    What sits where stays, and as few of the autoencoder's levels as the picture needs, but `least_strips` of them, are
    in strips.
    """
    work = replace(plan.work, height=height, width=width, tokens=tokens, from_image=from_image, together=together)
    allowed, reason = (0, *_levels(plan.sizes)), ""
    for levels in allowed[min(least_strips, len(allowed) - 1) :]:
        placement = replace(plan.placement, strip_levels=levels)
        stages = predict(plan.sizes, work, plan.budget, placement)
        plan = replace(plan, work=work, placement=placement, stages=stages)
        reason = _reason(stages, plan.budget)
        if not reason:
            break
    return plan, reason


def require_fit(
    plan: Plan, height: int, width: int, tokens: int, from_image: bool = False, together: int | None = None
) -> None:
    """Raises `NotEnoughMemory` for a picture that does not fit in a budget that is an amount; of what is free by itself
    the most frugal decode is tried."""
    _, reason = fit_picture(plan, height, width, tokens, from_image, together)
    if reason and plan.budget.name != "auto":
        amount = plan.budget.name or "the budget"
        raise NotEnoughMemory(
            f"{width}x{height} does not fit in {amount}: {reason}; choose a smaller size, or load with more memory"
        )


def fits_beside(plan: Plan, stage: str, picture: Demands, current: Demands) -> bool:
    """Whether `stage` ("prompt", "decoding") of one picture fits beside the prompt and the steps of the `current` one.

    A text encoder that passes through the device never does: its layers and the blocks would take each other's places.
    """
    if stage == "prompt" and plan.placement.text_encoder == "streamed":
        return False
    (other, refused), (own, own_refused) = fit_picture(plan, *picture), fit_picture(plan, *current)
    if refused or own_refused:
        return False
    busiest = max(one.device for one in own.stages if one.name != "decoding")
    return busiest + stage_needs(plan.sizes, other.work, other.placement)[stage] <= plan.budget.device


def lower(plan: Plan, stage: str, *, has_files: bool = True) -> Plan:
    """The next rung for the work of `plan`, of which `stage` ran out of memory: what it was predicted to need is not
    there, so the fastest placement that makes do with a twentieth less, or else the one that needs least.

    What passes through the device already still does, and what waits in files stays there. Without `has_files` weights
    can only wait in the host's memory. Raises `NotEnoughMemory` where there is none.
    """
    least = need = _need(plan.stages, stage)
    budget, frugal = replace(plan.budget, device=int(STEP_DOWN * min(need, plan.budget.device))), None
    for rung in _rungs(plan, budget, has_files):
        if not _reason(rung.stages, budget):
            return rung
        if _need(rung.stages, stage) < least and not _reason(rung.stages, replace(budget, device=rung.device_peak)):
            least, frugal = _need(rung.stages, stage), rung
    if frugal is not None:
        return replace(frugal, budget=replace(budget, device=frugal.device_peak))
    size = f"{plan.work.width}x{plan.work.height}"
    raise NotEnoughMemory(
        f"{stage} ran out of memory at {size}, where {gib(need)} were planned for, and there is no more frugal plan; "
        f"choose a smaller size, or free memory of the device. The plan was: {plan.placement}"
    )


def with_adapters(plan: Plan, adapters: int, *, control_blocks: int = 0, has_files: bool = True) -> Plan:
    """`plan` with so many bytes of adapters on the device, a ControlNet of so many blocks among them; where they do not
    fit, the fastest placement where they do.

    What passes through the device already still does. Raises `NotEnoughMemory` where there is none.
    """
    sizes = replace(plan.sizes, adapters=adapters, control_blocks=control_blocks)
    kept = follow(plan, sizes, plan.work.dtype)
    reason = _reason(kept.stages, kept.budget)
    if not reason or adapters <= plan.sizes.adapters:
        return kept
    for rung in _rungs(kept, kept.budget, has_files):
        if not _reason(rung.stages, rung.budget):
            return rung
    raise NotEnoughMemory(f"with {gib(adapters)} of adapters {reason}")


class Planning:
    """Makes the plan that a model is loaded for, and a lower one whenever memory ran out while it was."""

    def __init__(self, make: Callable[[ModelSizes], Plan]) -> None:
        self._make = make
        self._plan: Plan | None = None

    def __call__(self, sizes: ModelSizes) -> Plan:
        self._plan = self._plan or self._make(sizes)
        return self._plan

    def step_down(self, reason: str) -> None:
        """Plan for less from now on; raises `NotEnoughMemory` where there is nothing less."""
        if self._plan is None:
            raise NotEnoughMemory(f"memory ran out before anything was loaded ({reason}); free some of it")
        largest = max(self._plan.stages, key=lambda stage: stage.device)
        lowered = lower(self._plan, largest.name)
        said = f"loading ran out of memory ({reason}); since then: {lowered.placement}"
        self._plan = replace(lowered, stepped_down=(*self._plan.stepped_down, said))


def _rungs(plan: Plan, budget: Budget, has_files: bool) -> Iterator[Plan]:
    """Plans for the work of `plan` that leave no more on the device, from the fastest to the most frugal."""
    for candidate in _placements(plan.sizes, plan.work, budget, None, plan.placement.weights):
        placement = plan.placement.or_lower(candidate)
        for text, blocks in _sources(plan.placement, placement, budget, has_files):
            chosen = replace(placement, text_source=text, block_source=blocks)
            stages = predict(plan.sizes, plan.work, budget, chosen)
            yield replace(plan, placement=chosen, budget=budget, stages=stages)


def _choices(
    sizes: ModelSizes, work: Work, budget: Budget, text_encoder: str | None, weights: str | None
) -> Iterator[Placement]:
    """What may be chosen: weights as they are asked for, or in full and then in int8, which changes pictures.

    To float32 layers of bfloat16 files may be widened as they are used: the same numbers in half the memory, so nothing
    is streamed in full before that.
    """
    if weights is not None:
        yield from _placements(sizes, work, budget, text_encoder, None if weights == FULL else weights)
        return
    if work.dtype == "float32" and sizes.in_bfloat16:
        yield from () if text_encoder not in (None, "resident") else (_everything(sizes),)
        yield from _placements(sizes, work, budget, text_encoder, EXACT)
    else:
        yield from _placements(sizes, work, budget, text_encoder, None)
    yield from _placements(sizes, work, budget, text_encoder, FALLBACK)


def _placements(
    sizes: ModelSizes, work: Work, budget: Budget, text_encoder: str | None, weights: str | None
) -> Iterator[Placement]:
    """From the fastest to the most frugal. Strips change bits of the picture, if little, and come last."""
    everything = replace(_everything(sizes), weights=weights)
    places = [text_encoder] if text_encoder else ["resident", "streamed"]
    if "resident" in places:
        yield everything
    for levels in (0, *_levels(sizes)):
        for place in places:
            whole = replace(
                everything, text_encoder=place, slots=SLOTS if place == "streamed" else 0, strip_levels=levels
            )
            if whole != everything:
                yield whole
            if place == places[-1]:
                yield _most_resident(sizes, work, budget, replace(whole, slots=SLOTS, context_resident=False))


def _everything(sizes: ModelSizes) -> Placement:
    count = len(sizes.blocks)
    return Placement(text_encoder="resident", resident_blocks=count, blocks=count, context_resident=True, slots=0)


def _most_resident(sizes: ModelSizes, work: Work, budget: Budget, placement: Placement) -> Placement:
    """With as many blocks on the device as fit there, at least none and not all."""
    none = replace(placement, resident_blocks=0)
    room = budget.device - max(stage.device for stage in predict(sizes, work, budget, none))
    fit = min(max(0, int(room // max(layers_of(sizes, work, placement).blocks))), placement.blocks - 1)
    return replace(none, resident_blocks=fit)


def _with_source(sizes: ModelSizes, work: Work, budget: Budget, placement: Placement) -> tuple[Placement, str]:
    """The placement with as much of its weights in the host's memory as fits, and why it does not fit, "" if it does.

    Blocks come first: they are needed in every step, the text encoder once for each new prompt.
    """
    reason = ""
    for text, blocks in _sources(None, placement, budget, has_files=True):
        placement = replace(placement, text_source=text, block_source=blocks)
        reason = _reason(predict(sizes, work, budget, placement), budget)
        if not reason:
            break
    return placement, reason


def _sources(current: Placement | None, placement: Placement, budget: Budget, has_files: bool) -> list[tuple[str, str]]:
    """Where weights of `placement` may wait, the faster first; what is in files in `current` stays there.

    A device that is the host has no other memory to let them wait in.
    """

    def allowed(source: str, waits: bool, before: str | None) -> bool:
        if not waits or source == before:
            return True
        return before != "files" and (has_files if source == "files" else budget.host is not None)

    text_before = current.text_source if current is not None and current.text_waits else None
    blocks_before = current.block_source if current is not None and current.blocks_wait else None
    return [
        (text, blocks)
        for text, blocks in (("memory", "memory"), ("files", "memory"), ("files", "files"))
        if allowed(text, placement.text_waits, text_before) and allowed(blocks, placement.blocks_wait, blocks_before)
    ]


def _levels(sizes: ModelSizes) -> tuple[int, ...]:
    return tuple(levels for levels in STRIP_LEVELS if levels < len(sizes.vae_channels))


def _need(stages: tuple[Stage, ...], name: str) -> int:
    return next(stage.device for stage in stages if stage.name == name)


def _reason(stages: tuple[Stage, ...], budget: Budget) -> str:
    worst = max(stages, key=lambda stage: stage.device)
    if worst.device > budget.device:
        return f"{worst.name} needs {gib(worst.device)} of the device and {gib(budget.device)} may be used"
    host = max(stage.host for stage in stages)
    if budget.host is not None and host > budget.host:
        return f"{gib(host)} of the host's memory are needed and {gib(budget.host)} may be used"
    return ""


def _too_little(sizes: ModelSizes, work: Work, budget: Budget, last: Rejected, weights: str | None) -> str:
    size = f"{work.width}x{work.height}"
    side = max(work.height, work.width)
    while (side := side // 2 // 16 * 16) >= 256:
        ratio = side / max(work.height, work.width)
        height, width = (max(16, round(pixels * ratio / 16) * 16) for pixels in (work.height, work.width))
        smaller = replace(work, height=height, width=width)
        choices = _choices(sizes, smaller, budget, None, weights)
        if any(not _with_source(sizes, smaller, budget, one)[1] for one in choices):
            return f"{size} does not fit: even with {last.placement}, {last.reason}; {width}x{height} would fit"
    return f"{size} does not fit, nor does a smaller picture: even with {last.placement}, {last.reason}"
