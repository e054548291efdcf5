"""What is known of each Z-Image model before anything is loaded: its recipe, and how to tell it from the other.

Frozen facts and the rule of detection; knows nothing of files, tensors or requests. Sources: the model cards
and scheduler configs of `Tongyi-MAI/Z-Image` and `Tongyi-MAI/Z-Image-Turbo` on the Hugging Face hub.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CheckpointError, RequestError


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A Z-Image model's facts and the recipe it is used with where a request leaves something open."""

    name: str
    title: str
    hub_id: str
    shift: float
    """Static shift of the flow-matching schedule (`shift` in scheduler_config.json)."""
    num_inference_steps: int
    guidance_scale: float
    supports_guidance: bool
    """Whether classifier-free guidance and negative prompts mean anything to the model."""
    supports_cache: bool
    """Whether its steps are many enough that some can be predicted from others."""
    height: int = 1024
    width: int = 1024
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    sampler: str = "euler"
    """By which its step counts are meant; a checkpoint may name another, and another guidance (`own`)."""
    max_sequence_length: int = 512
    advice: str = ""
    """When to choose it, in one sentence."""

    @property
    def evaluations(self) -> int:
        """Transformer evaluations of one picture made with the recipe."""
        return self.num_inference_steps * (2 if self.guidance_scale > 0 else 1)


BASE = Variant(
    name="base",
    title="Z-Image",
    hub_id="Tongyi-MAI/Z-Image",
    shift=6.0,
    num_inference_steps=50,
    guidance_scale=4.0,
    supports_guidance=True,
    supports_cache=True,
    advice="for variety between seeds, negative prompts and fine-tuning; an image takes 56 to 100 evaluations",
)
TURBO = Variant(
    name="turbo",
    title="Z-Image-Turbo",
    hub_id="Tongyi-MAI/Z-Image-Turbo",
    shift=3.0,
    num_inference_steps=8,
    guidance_scale=0.0,
    supports_guidance=False,
    supports_cache=False,
    advice="for speed: an image takes 8 evaluations; no guidance, no negative prompt, seeds look alike",
)

VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (BASE, TURBO)}
"""The variants by the name that users write: `base`, `turbo`."""

DEMOS = {"demo": BASE.name, "demo-turbo": TURBO.name}
"""Small models that come with the package, by the name that users write, and the variant that each is.

They draw coloured shapes at 128² pixels, for trying and for tests; `zimage.training` makes them."""


def get_variant(name: str) -> Variant:
    """The variant called `name`; raises `RequestError` if there is none."""
    try:
        return VARIANTS[name]
    except (KeyError, TypeError):
        raise RequestError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}") from None


def detect_variant(*, variant: str | None, hub_id: str | None, shift: float | None) -> Variant:
    """Decide which variant a checkpoint is.

    An explicit `variant` is the answer, unless the hub id is the other model's own. Without it the hub id and the
    scheduler's `shift` are asked; where they disagree or neither tells, `CheckpointError` asks for `variant`.
    """
    by_id = next((known for known in VARIANTS.values() if known.hub_id == hub_id), None)
    by_shift = next((known for known in VARIANTS.values() if known.shift == shift), None)
    if variant is not None:
        chosen = get_variant(variant)
        if by_id is not None and by_id != chosen:
            raise CheckpointError(
                f"variant={variant!r} was asked for, but {hub_id} is {by_id.title} ({by_id.name}); "
                f"leave variant out, or load {chosen.hub_id}"
            )
        return chosen
    if by_id is not None and by_shift is not None and by_id != by_shift:
        raise CheckpointError(
            f"{hub_id} should be {by_id.name}, but its scheduler's shift {shift:g} is that of {by_shift.name}; "
            f"say which it is: variant='{by_id.name}' or variant='{by_shift.name}'"
        )
    found = by_id or by_shift
    if found is None:
        known_shifts = ", ".join(f"{known.shift:g} is {known.name}" for known in VARIANTS.values())
        came = "no shift" if shift is None else f"shift {shift:g}"
        raise CheckpointError(
            f"cannot tell which Z-Image model this is: its scheduler has {came} ({known_shifts}); "
            "say which: variant='base' or variant='turbo'"
        )
    return found
