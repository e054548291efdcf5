"""The transformer's modulated blocks as torch's compiler makes them: one program for all blocks, sizes and prompts.

The number of tokens stays open in it and all else is fixed, so that nothing is compiled again for a prompt of another
length. Blocks are computed as they are where the project's own kernels compute them, which are faster (docs/speed.md),
and where compiled code would not do what is wanted (gradients, a second try in float32, hooks, of which torch does not
notice those that come later) or cannot be made. Knows no pipeline.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from ..errors import RequestError, ZImageWarning
from ..kernels.switch import used
from .block import BlockModulation, run_block
from .layers import is_bare
from .precision import Float32Math
from .transformer import ZImageTransformer

_PLACE = "_run_block"


class CompiledBlock:
    """Computes a block in place of a transformer's own `_run_block`; takes itself out again if compiling fails."""

    def __init__(self, transformer: ZImageTransformer, backend: Any) -> None:
        self._transformer = transformer
        # torch keeps what it compiled, and counts towards its limit, by code object: one for each transformer.
        own = FunctionType(run_block.__code__.replace(), run_block.__globals__, "run_block")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's of itself, as its compiler is imported
            try:
                self._run = torch.compile(own, backend=backend, dynamic=False)
            except RuntimeError as error:
                raise RequestError(f"torch cannot compile here ({error}); leave pipe.compile() out") from error

    def __call__(
        self,
        block: nn.Module,
        tokens: Tensor,
        rotations: Tensor,
        modulation: BlockModulation | None,
        attend: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """`tokens` (B, N, dim) after `block`; as it stands without `modulation`, so for a caption, and with an `attend`
        of its own, so for several sequences."""
        settings = self._transformer.compute_dtype, attend or self._transformer.attend
        is_usual = modulation is not None and attend is None
        if not is_usual or used(tokens.device) or not computes_plainly() or not _is_plain(block):
            return run_block(block, tokens, rotations, modulation, *settings)
        pairs = torch.view_as_real(rotations)  # a compiler would warn of complex numbers
        for tensor in (tokens, pairs):
            torch._dynamo.mark_dynamic(tensor, 1)
        try:
            return self._run(block, tokens, pairs, modulation, *settings)
        except Exception as error:
            if not _is_of_the_compiler(error):
                raise
            self._give_up(error)
        return run_block(block, tokens, rotations, modulation, *settings)

    def _give_up(self, error: Exception) -> None:
        restore_blocks(self._transformer)
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).splitlines() or [""])[0]
        warnings.warn(
            f"the transformer's blocks cannot be compiled here and are computed as they are: {type(cause).__name__}: "
            f"{reason} (a CPU needs a C++ compiler, CUDA needs Triton; without pipe.compile() nothing is compiled)",
            ZImageWarning,
            stacklevel=3,
        )


def compile_blocks(transformer: ZImageTransformer, backend: Any = "inductor") -> None:
    """Let the modulated blocks be compiled by torch's `backend` when they are first used; done once, it is done.

    Raises `RequestError` where torch has no compiler at all.
    """
    if not is_compiled(transformer):
        setattr(transformer, _PLACE, CompiledBlock(transformer, backend))


def restore_blocks(transformer: ZImageTransformer) -> None:
    """The inverse of `compile_blocks`; what was compiled is let go of."""
    if is_compiled(transformer):
        delattr(transformer, _PLACE)


def is_compiled(transformer: ZImageTransformer) -> bool:
    """Whether modulated blocks are to be compiled when they are first used where no kernels compute them."""
    return isinstance(vars(transformer).get(_PLACE), CompiledBlock)


def computes_compiled(transformer: ZImageTransformer) -> bool:
    """Whether that is done: `is_compiled` holds, and no kernels compute the blocks in place of what is compiled."""
    return is_compiled(transformer) and not used(transformer.x_pad_token.device)


def computes_plainly() -> bool:
    """Whether compiled or recorded code does what is wanted here: no gradients, no wider type, no compiler around."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not any(isinstance(mode, Float32Math) for mode in _get_current_function_mode_stack())


def _is_plain(block: nn.Module) -> bool:
    return all(map(is_bare, block.modules()))


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether compiling failed, for another reason than memory of the device; what runs raises errors of its own."""
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError  # slow, and there once it compiles

    if not isinstance(error, torch._dynamo.exc.TorchDynamoException | ConstraintViolationError):
        return False
    return not isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError | MemoryError)
