"""What is measured: a model, a picture, the stages and how often. Plain data, checked before anything is built.

Loads no torch. What a picture may be is the library's rule (`request`), not this module's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError
from ..memory.planner import check_weights
from ..request import GenerationRequest, ResolvedRequest
from ..rules import rounds_attention
from ..testing.configs import SIZES
from ..variants import Variant, get_variant

STAGES = ("encode", "denoise", "decode", "end-to-end")
"""In the order of a picture; the last is all of it, from the prompt to a PIL image."""
SIDES = ("zimage", "diffusers")
ROUNDED = ("int8", "float8", "nf4")
"""What zimage's layers can be stored as beside diffusers' in full."""
KEPT_ROUNDS = 10
"""Rounds of a result that is kept: a median of fewer moves with every disturbance."""
PICTURES: dict[str, tuple[int, int | None]] = {
    "tiny": (256, 8),
    "small": (512, 4),
    "wide": (512, 2),
    "real": (1024, None),
}
"""Side in pixels and steps for each size of random weights; `None` is the variant's own."""
SENTENCE = "a red fox in the snow next to an old wooden house under a blue sky in the morning light"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One measurement. `None` means: as the size, else the model's recipe has it.

    Args:
        size: random weights of this size of `zimage.testing`, made in memory.
        model: an existing model instead: an alias, a hub id or a folder.
        variant: of the random weights, "turbo" or "base"; base is measured with guidance and a negative prompt.
        device, dtype: as for `ZImagePipeline.from_pretrained`.
        height, width, steps: of the picture.
        rounds: measured runs of each side and stage, after one that is not.
        stages: some of `STAGES`.
        only: "zimage" leaves diffusers out.
        compile: both sides with the transformer's blocks compiled, each in its own way (zimage's kernels go on where
            there are any); the round that is not measured waits for the compiler.
        cuda_graphs: zimage's side with CUDA graphs, for pictures of up to 1024 x 1024 pixels; diffusers has none.
        weight_dtype, quantize_activations: what zimage's transformer stores its layers as and multiplies in, as for
            `ZImagePipeline.from_pretrained`; diffusers' side and all else stay as they are.
        attention: what zimage's transformer computes attention with, as for `ZImagePipeline.set_attention_backend`;
            diffusers' leaves it to torch.
        words: of the prompts, a number that no other round has included.

    Raises `RequestError` for what cannot work.
    """

    size: str | None = None
    model: str | None = None
    variant: str | None = None
    device: str | None = None
    dtype: str = "auto"
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    rounds: int = KEPT_ROUNDS
    stages: tuple[str, ...] = STAGES
    only: str | None = None
    compile: bool = False
    cuda_graphs: bool = False
    weight_dtype: str | None = None
    quantize_activations: bool = False
    attention: str = "auto"
    words: int = 20

    def __post_init__(self) -> None:
        if (self.size is None) == (self.model is None):
            raise RequestError("either size, for random weights, or model must be given; leave the other out")
        if self.size is not None and self.size not in SIZES:
            raise RequestError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}")
        if self.rounds < 1:
            raise RequestError(f"rounds must be 1 or more, got {self.rounds}")
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise RequestError(f"stages must be of {', '.join(STAGES)}, got {', '.join(unknown) or 'none'}")
        if self.only not in (None, "zimage"):
            raise RequestError(f"only can be zimage, got {self.only!r}; without it both sides are measured")
        if self.weight_dtype not in (None, *ROUNDED):
            raise RequestError(f"weight_dtype can be {', '.join(ROUNDED)} here, or left out; got {self.weight_dtype!r}")
        check_weights(self.weight_dtype, self.quantize_activations)
        if self.size is not None:
            self.request(get_variant(self.variant or "turbo"))

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES if self.only is None else (self.only,)

    @property
    def layers(self) -> str:
        """How zimage's layers are stored and multiplied, and attention if that is rounded, in words."""
        rounded = "weights and activations" if self.quantize_activations else "weights"
        words = "full" if self.weight_dtype is None else f"{rounded} in {self.weight_dtype}"
        return f"{words}, attention {self.attention}" if rounds_attention(self.attention) else words

    @property
    def is_rounded(self) -> bool:
        """Whether zimage's side computes with fewer bits than diffusers'."""
        return self.weight_dtype is not None or rounds_attention(self.attention)

    def request(self, variant: Variant) -> GenerationRequest:
        """The picture of every round, but for its prompt and noise; checked as far as `variant` tells."""
        side, steps = PICTURES[self.size] if self.size else (None, None)
        asked = GenerationRequest(
            prompt(0, self.words),
            negative_prompt=negative_prompt(0) if variant.guidance_scale > 0 else None,
            height=side if self.height is None else self.height,
            width=side if self.width is None else self.width,
            num_inference_steps=steps if self.steps is None else self.steps,
            sampler="euler",  # diffusers'
            any_size=True,
        )
        asked.resolve(variant)
        return asked


def prompt(number: int, words: int) -> str:
    """A plain English prompt of so many words, the last of them a number that makes it new."""
    sentence = SENTENCE.split()
    repeated = sentence * (words // len(sentence) + 1)
    return " ".join([*repeated[: words - 1], f"{number:05}"])


def negative_prompt(number: int) -> str:
    """A short negative prompt that is new."""
    return f"blurry, low quality {number:05}"


def texts(request: ResolvedRequest, number: int, words: int) -> tuple[str, ...]:
    """The texts of a round: the prompt and, with guidance, the negative prompt."""
    guided = (negative_prompt(number),) if request.guidance_scale > 0 else ()
    return (prompt(number, words), *guided)
