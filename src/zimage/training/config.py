"""Every number of the training: the sizes of the two models' parts and how each stage is run. Plain frozen data.

The sizes are chosen so that two transformers, one text encoder and one autoencoder together have fewer than 8 million
parameters, 16 MB in bfloat16. The architecture is that of the released models in all but these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LATENT_CHANNELS = 16
LATENT_SCALE = 8
"""Pixels per side of a latent pixel."""
BASE_GUIDANCE = 2.0
"""What the trained flow is guided with. It was measured: seeds then differ more than with the 4 of the released model's
recipe, and about as many pictures are as asked (docs/demo.md has the figures)."""
TURBO_SAMPLER = "dpmpp_2m"
"""What a distilled student is drawn with: in as many evaluations more is right than with Euler's steps, which it has
learned from (docs/training.md has the figures)."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Widths and depths of the trained models."""

    dim: int = 160
    n_heads: int = 5
    axes_dims: tuple[int, int, int] = (8, 12, 12)
    n_layers: int = 5
    n_refiner_layers: int = 1
    vocab_size: int = 576
    hidden_size: int = 128
    intermediate_size: int = 256
    text_layers: int = 3
    """Layers that run; the saved config counts one more, whose output nobody reads."""
    text_heads: int = 4
    text_kv_heads: int = 2
    text_head_dim: int = 32
    vae_channels: tuple[int, int, int, int] = (16, 32, 48, 48)
    vae_layers: int = 1
    vae_groups: int = 1
    """One group keeps the contrast between channels, which is colour; with many, each image's own scale is lost."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How a stage is optimised: AdamW (arXiv 1711.05101), warm-up, constant rate, linear decay to 0, and an average.

    Where `matrix_rate` is not 0, Muon (arXiv 2502.16982) trains the matrices that are neither a model's first nor its
    last, and AdamW the rest.

    `decay` is the share of the steps, at the end, in which the rate falls. The exponential moving average of the
    weights has the decay `min(ema_decay, (1 + step) / (10 + step))`, so that it forgets the start quickly.
    """

    steps: int
    batch: int
    learning_rate: float
    matrix_rate: float = 0.0
    """Muon's learning rate; an update's root mean square is a fifth of it."""
    warmup: int = 100
    decay: float = 0.3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema_decay: float = 0.999
    log_every: int = 50
    save_every: int = 500


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage(Stage):
    """The autoencoder: absolute and squared error of pixels in [-1, 1], of their differences, and a small KL term.

    The weights multiply means over pixels, and over latents for `kl`. At 1e-4 the noise that the KL term makes worth
    while is hardly visible, and in return close latents stay close in the picture.
    """

    steps: int = 6000
    batch: int = 32
    """Crops; the whole pictures of the last steps are a quarter as many."""
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 0.5
    crop: int = 64
    """Pixels per side of the crops around objects, a multiple of 8: a whole picture is mostly background."""
    whole: float = 0.2
    """Share of the steps, at the end, on whole pictures."""
    absolute: float = 1.0
    squared: float = 1.0
    edges: float = 1.0
    kl: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class FlowStage(Stage):
    """Flow matching (arXiv 2210.02747) of text encoder and transformer on the latents of stored scenes.

    Noise levels are logit-normal and shifted (arXiv 2403.03206, sections 3.1 and 5.3.2):
    `sigma = s·u / (1 + (s − 1)·u)` with `u = sigmoid(normal)`; a share of them is uniform
    instead, so that both ends are seen.
    """

    steps: int = 32_000
    batch: int = 64
    learning_rate: float = 1.5e-3
    matrix_rate: float = 5e-3
    warmup: int = 200
    decay: float = 0.4
    weight_decay: float = 0.02
    ema_decay: float = 0.9995
    scenes: int = 40_000
    """Scenes whose latents are stored, half of them square, a quarter of either other shape."""
    shift: float = 3.0
    uniform: float = 0.2
    dropout: float = 0.1
    """Share of captions that are replaced by the empty one, which guidance sets against."""
    alignment: float = 1.0
    """Weight of the error of what is read from the middle layer; see `alignment`."""
    long_every: int = 8
    """In one step of so many a scene is described again and again, until the caption has more than 32 tokens."""


@dataclass(frozen=True, kw_only=True)
class FinishingStage(FlowStage):
    """The flow once more, from the weights of a trained model: lower rates that fall from the start.

    Less noise than in `FlowStage`: what is not right yet are corners, and those are drawn last.
    """

    steps: int = 6000
    learning_rate: float = 7.5e-4
    matrix_rate: float = 2.5e-3
    decay: float = 0.95
    shift: float = 2.0


@dataclass(frozen=True, kw_only=True)
class DistillationStage(FlowStage):
    """Distillation of a guided teacher into eight evaluations; see `distill`."""

    steps: int = 4000
    learning_rate: float = 5e-4
    matrix_rate: float = 1.5e-3
    """Less than the flow's: the student starts from what its teacher knows."""
    dropout: float = 0.0
    alignment: float = 0.0
    """Nothing is read from the student."""
    guidance_scale: float = 5.0
    """The teacher's: one more than in the released model's recipe, since the student falls a little short of it."""
    teacher_steps: int = 4
    """Steps that the teacher takes from one of the student's levels to the next."""
    own_share: float = 0.5
    """Share of the steps whose lessons begin where the student gets to by itself: fewer captions, at all levels."""
    correction_share: float = 0.0
    """Share of the steps that are no lesson but a batch of corrections."""
    corrected: int = 8
    """Corrections in such a batch, beside as many ways that are kept."""


@dataclass(frozen=True, kw_only=True)
class CorrectionStage(DistillationStage):
    """A student that has learned is set right where it is wrong and its teacher is not; see `gathering`.

    Low rates and few steps: most of what it does is to stay.
    """

    steps: int = 160
    batch: int = 32
    learning_rate: float = 5e-5
    matrix_rate: float = 1.5e-4
    warmup: int = 10
    decay: float = 0.8
    log_every: int = 10
    save_every: int = 20
    correction_share: float = 0.8
    gathered: int = 800
    """Corrections to gather."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """All stages and the model that they train."""

    size: ModelSize = field(default_factory=ModelSize)
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    flow: FlowStage = field(default_factory=FlowStage)
    finishing: FinishingStage = field(default_factory=FinishingStage)
    distillation: DistillationStage = field(default_factory=DistillationStage)
    correction: CorrectionStage = field(default_factory=CorrectionStage)
