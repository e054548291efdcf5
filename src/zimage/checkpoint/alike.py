"""Whether two checkpoints have the same text encoder or VAE, told without reading all of their weights.

Files are compared by what they mean: how tensors are spread over files, prefixes of their names and the types they are
stored in do not count. Of each tensor some values are looked at, so a model is told from a fine-tune of it, and a
change of a few values elsewhere is not seen. What one file has in fewer bits is compared where the other has it so too.
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
"""Values of each tensor that are compared, its first ones; bytes of what is stored in fewer bits."""
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
    for name, (kind, values) in samples[0].items():
        other_kind, others = samples[1][name]
        if kind == other_kind and not torch.equal(values, others):
            return f"the values of {name} differ"
    return ""


def _samples(found: Survey, component: str) -> dict[str, tuple[str, Tensor]]:
    """The first values of each tensor, by its name in the module, in the type that both files can be rounded to; or, of
    what is stored in fewer bits or scaled, as what, and the first bytes."""
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
                    values = torch.frombuffer(bytearray(raw), dtype=_type(entry) or torch.uint8)
                    plain = "", values.bfloat16()
                    samples[targets[name]] = (entry.dtype, values) if _type(entry) is None else plain
    return samples


def _type(entry: Entry) -> torch.dtype | None:
    """The type of a tensor's values, `None` where they are not all there is to it."""
    return _DTYPES.get(entry.dtype) if entry.scale is None else None


def _wanted(entry: Entry) -> int:
    """Bytes of a tensor that are read."""
    return min(entry.end - entry.start, SAMPLE * (_type(entry) or torch.uint8).itemsize)


def _said(value: Any) -> str:
    return "missing" if value is None else str(value)[:60]
