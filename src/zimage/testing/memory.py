"""The models of a random checkpoint made in memory, as diffusers' pipeline over them: nothing is written to disk.

The values are those of `build_checkpoint`, so a folder and this give the same pictures. What is random is decided in
`weights` and `configs`; this module only puts it together.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..variants import get_variant
from . import configs
from .checkpoint import SizeName, VariantName
from .configs import DIFFUSERS_VERSION, SIZES, Config, DtypeName
from .tokenizer import write_tokenizer
from .weights import Values, blank_module


def build_diffusers(
    *,
    size: SizeName = "tiny",
    variant: VariantName = "turbo",
    dtype: DtypeName | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Any:
    """A diffusers `ZImagePipeline` with random weights on `device`, as if loaded from `build_checkpoint`'s folder.

    `dtype` is that of the size unless given. Beyond the weights it needs host memory for one tensor a thread. Raises
    `ValueError` for a size that there is not.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import Qwen2Tokenizer

    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(map(repr, SIZES))}, got {size!r}")
    shift, version, widths = get_variant(variant).shift, DIFFUSERS_VERSION[variant], SIZES[size]
    dtype = dtype or widths.dtype
    with tempfile.TemporaryDirectory() as folder:
        ids = write_tokenizer(Path(folder) / "tokenizer")
        tokenizer = Qwen2Tokenizer.from_pretrained(Path(folder) / "tokenizer")
    described = {
        "text_encoder": configs.text_encoder_config(widths, dtype, **ids),
        "transformer": configs.transformer_config(widths, version),
        "vae": configs.vae_config(widths, version),
    }

    def filled(component: str) -> Any:
        values = Values(component=component, size=widths, seed=seed, dtype=getattr(torch, dtype))
        return _filled(component, described[component], values, torch.device(device))

    schedule = configs.scheduler_config(version, shift)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedule)
    return ZImagePipeline(scheduler=scheduler, tokenizer=tokenizer, **{part: filled(part) for part in described})


def _filled(component: str, config: Config, values: Values, device: torch.device) -> Any:
    module = blank_module(component, config)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # torch's generators use one thread each
        tensors = threads.map(lambda name: values.tensor(name, shapes[name]).to(device), shapes)
        module.load_state_dict(dict(zip(shapes, tensors, strict=True)), assign=True)
    if component == "text_encoder":
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        # Its frequencies are computed, not stored, so they must be made outside of the meta device.
        with torch.device(device):
            module.rotary_emb = Qwen3RotaryEmbedding(module.config)
    return module.eval().requires_grad_(False)
