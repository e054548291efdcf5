"""Whether two checkpoints have the same text encoder or VAE, told without reading all of their weights.

Files are compared by what they mean: how tensors are spread over files, prefixes of their names and the types they are
stored in do not count. Of each tensor some values are looked at, so a model is told from a fine-tune of it, and a
change of a few values elsewhere is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .headers import Entry
from .reading import open_regular, read_up_to, reason
from .survey import Survey

SAMPLE = 1024
"""Values of each tensor that are compared, its first ones."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SETTINGS = {
    "vae": ("latent_channels", "scaling_factor", "shift_factor", "block_out_channels"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "rope_theta", "rms_norm_eps"),
}
"""What of the configs decides what comes out, beside shapes."""


def difference(one: Survey, other: Survey, component: str) -> str:
    """In what `component` ("text_encoder" or "vae") of two checkpoints without errors differs, "" if in nothing seen.

    Raises `CheckpointError` for files that cannot be read.
    """
    ours, theirs = getattr(one.configs, component), getattr(other.configs, component)
    for setting in _SETTINGS[component]:
        if ours.get(setting) != theirs.get(setting):
            return f"{setting} is {_said(ours.get(setting))} and {_said(theirs.get(setting))}"
    samples = _samples(one, component), _samples(other, component)
    if samples[0].keys() != samples[1].keys():
        return "they have other tensors"
    for name, values in samples[0].items():
        if not torch.equal(values, samples[1][name]):
            return f"the values of {name} differ"
    return ""


def _samples(found: Survey, component: str) -> dict[str, Tensor]:
    """The first values of each tensor, by its name in the module, in the type that both files can be rounded to."""
    targets = found.blanks[component].targets
    samples = {}
    for header in found.weights[component].headers:
        with open_regular(header.path) as file:
            for name, entry in header.entries.items():
                if name in targets:
                    try:
                        file.seek(entry.start)
                        raw = read_up_to(file, _wanted(entry))
                    except OSError as error:
                        raise CheckpointError(f"{header.path} cannot be read: {reason(error)}") from error
                    samples[targets[name]] = torch.frombuffer(bytearray(raw), dtype=_DTYPES[entry.dtype]).bfloat16()
    return samples


def _wanted(entry: Entry) -> int:
    """Bytes of a tensor that are read."""
    return min(entry.end - entry.start, SAMPLE * _DTYPES[entry.dtype].itemsize)


def _said(value: Any) -> str:
    return "missing" if value is None else str(value)[:60]
