"""Where and with what this process computes: the default device, and the versions that decide bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ._version import __version__
from .errors import RequestError


def choose_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the best there is: CUDA, then MPS, then the CPU; with the number that its tensors have, so that
    "cuda" is one card whichever thread asks. Raises `RequestError` for one that is not there, or on which nothing is
    computed ("meta")."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = named_device(device)
    with _usable(device):
        made = torch.empty(0, device=chosen)
        made.cpu()  # a device that keeps no values cannot give them back
    return made.device


def named_device(device: str | torch.device) -> torch.device:
    """The device that `device` means, be it there or not; raises `RequestError` where it means none."""
    with _usable(device):
        return torch.device(device)


def numbered_device(gpu_id: int | None, device: str | torch.device | None) -> str | torch.device | None:
    """diffusers' two ways to name a device as one."""
    if gpu_id is None:
        return device
    kind = named_device(device or "cuda")
    if kind.index not in (None, gpu_id):
        raise RequestError(f"gpu_id={gpu_id} and device={device!r} are two devices; leave one out")
    return f"{kind.type}:{gpu_id}"


def describe(
    device: torch.device,
    dtype: torch.dtype,
    strip_levels: int = 0,
    weights: str | None = None,
    *,
    activations: str | None = None,
    attention: str = "native",
    compiled: bool = False,
) -> dict[str, str]:
    """The parts of this process that the bits of a picture depend on, as texts; `strip_levels` of its decode, what
    `weights` are stored as and `activations` rounded to, if not in `dtype`, the backend of `attention`, and whether
    blocks were `compiled`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "zimage": __version__,
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "transformers": package_version("transformers"),
        "dtype": str(dtype).removeprefix("torch."),
        "device": name,
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "weights": weights or "full",
        "activations": activations or "full",
        "attention": attention,
        "blocks": "compiled" if compiled else "eager",
        "decode": f"{strip_levels} in strips" if strip_levels else "whole",
    }


def portable_path(folder: Path) -> str:
    """`folder` as a recipe names it: from `~` where it is under the home folder, so that no user name is given away."""
    absolute = folder.absolute()
    try:
        return f"~/{absolute.relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):
        return str(absolute)


@contextmanager
def _usable(device: object) -> Iterator[None]:
    """Whatever torch raises for `device` as a `RequestError`."""
    try:
        yield
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"device {device!r} cannot be used here ({reason}); leave it out, or pass 'cpu'") from error


@cache
def package_version(distribution: str) -> str:
    """The installed version of a distribution, or "unknown"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
