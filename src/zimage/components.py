"""The parts of a pipeline: whether they fit together, what they can take, and the way from and to diffusers.

Parts are shared, never copied. Knows configurations and modules, not what is computed with them.
"""

from __future__ import annotations

import math
from typing import Any

from .errors import CheckpointError
from .models.text_encoder import refuse_saving, with_last_layer
from .models.transformer import PATCH, TOKEN_MULTIPLE
from .own import KEYS, OwnRecipe
from .rules import Limits, native_side
from .variants import Variant

NAMES = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")


def check_parts(text_config: Any, transformer_config: Any, vae_config: Any) -> None:
    """Raises `CheckpointError` where the configurations of the three models do not belong together."""
    pairs = (
        ("the transformer's cap_feat_dim", transformer_config.cap_feat_dim, "the text encoder's hidden_size",
         text_config.hidden_size),
        ("the transformer's in_channels", transformer_config.in_channels, "the VAE's latent_channels",
         vae_config.latent_channels),
    )  # fmt: skip
    for name, value, other_name, other in pairs:
        if value != other:
            raise CheckpointError(
                f"the parts do not belong together: {name} is {value}, {other_name} is {other}; "
                "take all parts from one checkpoint"
            )


def limits_of(transformer_config: Any, vae_config: Any) -> Limits:
    """What requests may ask of a model with these configurations."""
    scale = 2 ** (len(vae_config.block_out_channels) - 1)
    caption_positions, *image_positions = transformer_config.axes_lens
    longest = (caption_positions - 2) // TOKEN_MULTIPLE * TOKEN_MULTIPLE  # positions 1..longest, then the image's
    return Limits(
        latent_channels=transformer_config.in_channels,
        latent_scale=scale,
        native_side=native_side(vae_config.sample_size),
        size_multiple=scale * PATCH,
        max_side=min(image_positions) * scale * PATCH,
        caption_features=transformer_config.cap_feat_dim,
        max_sequence_length=longest,
    )


def shift_of(scheduler: Any) -> float:
    """The static shift of a scheduler, or the number itself; raises `CheckpointError` for other schedules."""
    shift = scheduler if isinstance(scheduler, int | float) else getattr(scheduler.config, "shift", None)
    if shift is None or getattr(getattr(scheduler, "config", None), "use_dynamic_shifting", False):
        raise CheckpointError(f"{type(scheduler).__name__} has no static shift; pass the checkpoint's scheduler")
    if not math.isfinite(shift) or shift <= 0:
        raise CheckpointError(f"the scheduler's shift must be a number above 0, got {shift}")
    return float(shift)


def drawn_with(variant: Variant, own: OwnRecipe, scheduler: Any) -> Variant:
    """`variant` as this model is best drawn: with what is its `own`, else with what its scheduler's config names."""
    config = getattr(scheduler, "config", None)
    named = OwnRecipe(**{name: getattr(config, key, None) for name, key in KEYS.items()})
    return own.applied_to(named.applied_to(variant))


def parts_of(pipeline: Any) -> dict[str, Any]:
    """The parts of a diffusers Z-Image pipeline; raises `CheckpointError` if it is another or lacks one."""
    missing = [name for name in NAMES if getattr(pipeline, name, None) is None]
    if missing:
        raise CheckpointError(
            f"{type(pipeline).__name__} has no {', '.join(missing)}; pass a complete diffusers ZImagePipeline"
        )
    return {name: getattr(pipeline, name) for name in NAMES}


def to_diffusers(*, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, shift: float, own: OwnRecipe) -> Any:
    """A diffusers `ZImagePipeline` over the same modules; the text encoder's unread last layer does nothing there, so
    it cannot be saved by diffusers.

    It draws by its own recipe; what is the model's `own` stays in its scheduler's config.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers import ZImagePipeline as DiffusersPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.register_to_config(**own.to_config())
    pipeline = DiffusersPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=with_last_layer(text_encoder),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained = refuse_saving
    return pipeline
