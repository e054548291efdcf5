"""Random values for the weights of a checkpoint: which tensors there are, and what each is filled with.

Names and shapes come from the diffusers and transformers classes themselves, built without memory. Every tensor has
its own generator, seeded by the checkpoint's seed and the tensor's name, so its values depend on neither the dtype (but
for rounding), nor the order or the file in which it is written, nor any global state. Knows no files and no tokenizer.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from .configs import Config, Size

LARGE = 128.0
"""Factor on `w1` and `w3` for large activations: the largest hidden activation of a feed-forward grows by its square,
from about 10 to about 2e5. As a power of two it leaves every bit of the weights' mantissas alone. In the context
refiner, whose activations are the smallest for want of modulation, `w3` gets twice that."""

_CHUNK = 1 << 22
_HALF_WIDTH = math.sqrt(3.0)


@dataclass(frozen=True, kw_only=True)
class Law:
    """What tensors whose name matches `pattern` are drawn from: uniform around `mean`.

    The standard deviation is `std`, or `gain / sqrt(fan in)` where a gain is given, which turns inputs of root mean
    square 1 into outputs of root mean square `gain`.
    """

    pattern: str
    mean: float = 0.0
    std: float = 0.0
    gain: float = 0.0

    def deviation(self, shape: torch.Size) -> float:
        return self.gain / math.sqrt(math.prod(shape[1:])) if self.gain else self.std


def _transformer_laws(large: bool) -> tuple[Law, ...]:
    # The timestep embedding leaves with root mean square 1, so the argument of the gates' tanh has deviation 0.47. The
    # norms of queries and keys make attention pick tokens, so that caption and position show in the output.
    return (
        Law(pattern=r"\.norm_[qk]\.weight$", mean=1.5, std=0.1),
        Law(pattern=r"norm\d\.weight$|^cap_embedder\.0\.weight$", mean=1.0, std=0.1),
        Law(pattern=r"pad_token$", std=1.0),
        Law(pattern=r"adaLN_modulation\.\d\.weight$", gain=0.15),
        Law(pattern=r"adaLN_modulation\.\d\.bias$", std=0.45),
        Law(pattern=r"^t_embedder\.mlp\.0\.weight$", gain=1.4),
        Law(pattern=r"^t_embedder\.mlp\.2\.weight$", gain=1.6),
        Law(pattern=r"\.after_proj\.weight$", gain=0.5),
        Law(pattern=r"^all_final_layer\..*\.linear\.weight$", gain=0.7),
        Law(pattern=r"^context_refiner\..*\.feed_forward\.w3\.weight$", gain=2.0 * LARGE if large else 1.0),
        Law(pattern=r"\.feed_forward\.w[13]\.weight$", gain=LARGE if large else 1.0),
        Law(pattern=r"\.bias$", std=0.1),
        Law(pattern=r"\.weight$", gain=1.0),
    )


def _text_encoder_laws(size: Size) -> tuple[Law, ...]:
    # Each layer adds twice to the residual stream, and all layers together about as much as the embedding.
    share = 0.7 / math.sqrt(2 * size.text_layers)
    return (
        Law(pattern=r"norm\.weight$", mean=1.0, std=0.1),
        Law(pattern=r"^embed_tokens\.weight$", std=0.7),
        Law(pattern=r"\.o_proj\.weight$", gain=2.0 * share),
        Law(pattern=r"\.down_proj\.weight$", gain=1.7 * share),
        Law(pattern=r"\.weight$", gain=1.0),
    )


_VAE_LAWS = (
    Law(pattern=r"norm[_a-z0-9]*\.weight$", mean=1.0, std=0.1),
    Law(pattern=r"^encoder\.conv_out\.weight$", gain=4.0),
    Law(pattern=r"^decoder\.conv_out\.weight$", gain=0.5),
    Law(pattern=r"\.bias$", std=0.1),
    Law(pattern=r"\.conv[12]\.weight$", gain=1.4),
    Law(pattern=r"\.weight$", gain=1.0),
)


def laws(component: str, size: Size, *, large: bool = False) -> tuple[Law, ...]:
    """The laws of a component's tensors; the first whose pattern is found in the name holds."""
    if component in ("transformer", "controlnet"):
        return _transformer_laws(large)
    return _text_encoder_laws(size) if component == "text_encoder" else _VAE_LAWS


def blank_module(component: str, config: Config) -> Any:
    """The diffusers or transformers module of a component (`transformer`, `text_encoder`, `vae`, `controlnet`), without
    memory."""
    from diffusers import AutoencoderKL, ZImageControlNetModel, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    classes: dict[str, Any] = {
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
        "controlnet": ZImageControlNetModel,
    }
    with torch.device("meta"):
        if component == "text_encoder":
            return Qwen3Model(Qwen3Config(**arguments))
        return classes[component](**arguments)


def tensor_shapes(component: str, config: Config) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of a component, in the model's order."""
    return {name: tensor.shape for name, tensor in blank_module(component, config).state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values of a component's tensors: a function of these fields and of a tensor's name and shape."""

    component: str
    size: Size
    seed: int
    dtype: torch.dtype
    large: bool = False

    def tensor(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One tensor, drawn in float32 and rounded to `dtype`."""
        law = next(law for law in laws(self.component, self.size, large=self.large) if re.search(law.pattern, name))
        digest = hashlib.blake2b(f"{self.seed}/{self.component}/{name}".encode(), digest_size=4).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))
        reach = _HALF_WIDTH * law.deviation(shape)
        tensor = torch.empty(shape, dtype=self.dtype, device="cpu")
        flat = tensor.view(-1)
        for start in range(0, len(flat), _CHUNK):
            chunk = flat[start : start + _CHUNK]
            drawn = torch.empty(chunk.shape, dtype=torch.float32, device="cpu")
            drawn.uniform_(law.mean - reach, law.mean + reach, generator=generator)
            if self.component == "vae" and name.startswith("encoder.conv_out."):
                _narrow_posterior(drawn, name)
            chunk.copy_(drawn)
        return tensor


def _narrow_posterior(conv_out: torch.Tensor, name: str) -> None:
    """Bring the encoder's log variance, the second half of what its last convolution gives, to about -6."""
    log_variance = conv_out[len(conv_out) // 2 :]
    if name.endswith(".bias"):
        log_variance -= 6.0
    else:
        log_variance *= 0.25
