"""Which kernel attention runs with: what was asked for, else FlashAttention-3 where it is, else what torch picks.

The kernels are diffusers' attention backends, by its names, and one of our own, "float8". None that rounds queries or
keys is ever chosen here, and none that downloads code can be. Knows no blocks and no weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from ..errors import RequestError
from ..kernels.switch import run, used, using, wanted
from .rowwise import LEAST_SCALE, MOST, NARROW, Quantized, Rows

AUTO, FASTEST, FLOAT8 = "auto", "fastest", "float8"
EXACT = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3")
"""Those that compute softmax attention in the type they are given; "fastest" measures these."""
GAIN = 0.98
"""Another is taken for "native" if it needs less than this part of its time: differences below are noise."""
_HOPPER = (9, 0)
_ROUNDS = 7
_TRIAL_TOKENS = 192
_HEAD = 128


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, backend: Any = None, chosen: AttentionBackendName | None = None
) -> Tensor:
    """Attention of queries, keys and values (B, N, heads, head_dim), with the backend `chosen`, else the processor's.

    float32, which an overflow can bring about in the middle of a picture, goes to torch where the chosen one is not
    torch's: none of the others takes it.
    """
    backend = chosen or backend or _automatic(query.device, query.dtype)
    if backend is not None:
        backend = _for_type(AttentionBackendName(backend), query.dtype)
    result: Tensor = dispatch_attention_fn(query, key, value, backend=backend)
    return result


def attend_in_float8(query: Rows, key: Rows, value: Tensor, *, backend: Any = None) -> Tensor:
    """`attend`, in float8 where queries and keys are so already; values are rounded here."""
    if isinstance(query, Quantized) and isinstance(key, Quantized):
        mixed = _in_float8(query, key, value)
        if mixed is not None:
            return mixed
    exact = [one if isinstance(one, Tensor) else one.widened() for one in (query, key)]
    return attend(exact[0], exact[1], value, backend=backend)


def apart(attend: Callable[..., Tensor], lengths: Sequence[int]) -> Callable[..., Tensor]:
    """`attend` of several sequences that lie one after the other, of so many tokens each: each within itself. In float8
    of one batch, whose parts lie dense."""
    return partial(_attend_apart, attend, tuple(lengths))


def _attend_apart(
    attend: Callable[..., Tensor], lengths: tuple[int, ...], query: Rows, key: Rows, value: Tensor, **options: Any
) -> Tensor:
    parts = zip(*(_parts(rows, lengths) for rows in (query, key, value)), strict=True)
    return torch.cat([attend(*part, **options) for part in parts], dim=1)


def _parts(rows: Rows, lengths: tuple[int, ...]) -> list[Rows]:
    if isinstance(rows, Tensor):
        return list(rows.split(lengths, dim=1))
    return [replace(rows, values=values) for values in rows.values.split(lengths, dim=1)]  # one scale for all


def row_kind_of(attend: Callable[..., Tensor], value: Tensor) -> str | None:
    """What `attend` takes queries and keys in beside these values, "float8", or `None` for their own type."""
    own = attend.args[0] if isinstance(attend, partial) and attend.func is _attend_apart else attend
    narrow = own is attend_in_float8 and wanted(value) and run("attention.takes", value)
    return FLOAT8 if narrow else None


def attend_with(name: str) -> Callable[..., Tensor]:
    """`attend` with the backend of this name."""
    return attend_in_float8 if name == FLOAT8 else partial(attend, chosen=AttentionBackendName(name))


def name_of(transformer: Any, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `transformer` computes with on `device` in `dtype`; "native" is torch's choice, "own" that of
    whoever put another function in its place."""
    given = vars(transformer).get("attend")
    if given is attend_in_float8 and _is_narrow(transformer.config, device, dtype):
        return FLOAT8
    if given not in (None, attend_in_float8) and not isinstance(given, partial):
        return "own"
    processor = next((block.attention.processor for block in transformer.layers), None)
    chosen = given.keywords["chosen"] if isinstance(given, partial) else getattr(processor, "_attention_backend", None)
    chosen = chosen or _automatic(device, dtype) or attention_dispatch._AttentionBackendRegistry._active_backend
    return str(_for_type(AttentionBackendName(chosen), dtype).value)


def choose(backend: str, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that `backend` means here; "fastest" measures with so many tokens.

    Raises `RequestError` for one that there is not, that downloads code or that does not work here.
    """
    if backend == FASTEST:
        return _fastest(_inputs(tokens, heads, head_dim, device, dtype))
    names = [known.value for known in AttentionBackendName if not known.value.endswith("_hub")]
    if isinstance(backend, str) and backend.endswith("_hub"):
        raise RequestError(
            f"attention backend {backend!r} runs code that it downloads, which zimage does not; install its package "
            f"and use the backend of that ({', '.join(names)})"
        )
    if backend not in (FLOAT8, *names):
        raise RequestError(f"attention backend must be auto, fastest, float8, {', '.join(names)}; got {backend!r}")
    trial = _inputs(_TRIAL_TOKENS, heads, head_dim, device, dtype)
    try:
        if backend != FLOAT8:
            attention_dispatch._check_attention_backend_requirements(AttentionBackendName(backend))  # names the package
        result = _narrow(trial) if backend == FLOAT8 else _with(backend, trial)()
        good = torch.nn.functional.cosine_similarity(result.flatten().float(), _exact(trial), dim=0).item() > GAIN
        reason = "its result is wrong"
    except RequestError:
        raise
    except Exception as error:  # whatever a library has to say about its absence, the device or the type
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        good, reason = False, shorten(said, 300, placeholder=" ...").rstrip(".")
    if not good:
        raise RequestError(
            f"attention backend {backend!r} does not work on {device} in {dtype}: {reason}; leave it out"
        )
    return backend


def check_works(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `RequestError` for a backend that `choose` would refuse for heads as the released models have them, before
    any of theirs is there."""
    if backend not in (AUTO, FASTEST):
        choose(backend, 1, 1, _HEAD, device, dtype)


def _for_type(backend: AttentionBackendName, dtype: torch.dtype) -> AttentionBackendName:
    """`backend`, or torch's where that takes no float32."""
    takes = dtype != torch.float32 or "native" in backend.value
    return backend if takes else AttentionBackendName.NATIVE


def _is_narrow(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model's attention in float8 is computed so where it is now, which may be another card."""
    value = torch.empty((1, 1, 1, config.dim // config.n_heads), device=device, dtype=dtype)
    return used(device) and row_kind_of(attend_in_float8, value) == FLOAT8


def _in_float8(query: Quantized, key: Quantized, value: Tensor) -> Tensor | None:
    if not wanted(value):
        return None
    mixed: Tensor | None = run("attention.attend", query.values, query.scale, key.values, key.scale, value)
    return mixed


def _narrow(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """In float8, or an error."""
    query, key, value = inputs
    if used(value.device):
        with using("on"):  # what fails here is no reason to compute all else without kernels
            mixed = _in_float8(_rounded(query), _rounded(key), value)
        if mixed is not None:
            return mixed
    raise RequestError(
        f"attention backend 'float8' does not work on {value.device} in {value.dtype}: it needs a Hopper card "
        "(compute capability 9.0), Triton 3.4 or newer, bfloat16 or float16, heads of 32, 64 or 128 channels, and "
        "zimage's kernels; leave it out"
    )


def _rounded(wide: Tensor) -> Quantized:
    scale = (wide.float().abs().amax() / MOST[FLOAT8]).clamp(min=LEAST_SCALE).view(1)
    return Quantized((wide / scale).to(NARROW[FLOAT8]), scale, wide.dtype)


def _automatic(device: torch.device, dtype: torch.dtype) -> AttentionBackendName | None:
    """FlashAttention-3 on the cards that it was written for, where it is installed; `None` leaves it to torch."""
    is_there = getattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False) and device.type == "cuda"
    if is_there and dtype != torch.float32 and torch.cuda.get_device_capability(device) == _HOPPER:
        return AttentionBackendName._FLASH_3
    return None


def _fastest(inputs: tuple[Tensor, Tensor, Tensor]) -> str:
    times: dict[str, float] = {}
    for name in EXACT:
        try:
            times[name] = _median(_with(name, inputs), inputs[0].device)
        except Exception:  # not installed, or not for this device or type
            continue
    best = min(times, key=lambda name: times[name])
    return best if times[best] < GAIN * times["native"] else "native"


def _median(work: Callable[[], Tensor], device: torch.device) -> float:
    taken = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # another thread may be recording on the card
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _with(name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    return partial(dispatch_attention_fn, *inputs, backend=AttentionBackendName(name))


def _inputs(
    tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (3, 1, tokens, heads, head_dim)
    query, key, value = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(
        device=device, dtype=dtype
    )
    return query, key, value


def _exact(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Written out, in float32."""
    query, key, value = (tensor.float().transpose(1, 2) for tensor in inputs)  # (1, heads, N, head_dim)
    scores = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
    return (scores @ value).transpose(1, 2).flatten()
