"""One plan for two models that share text encoder and autoencoder, as base and Turbo do in a relay.

Their transformers are planned as one whose blocks are the two's together: what is left on the device is left of both,
and what passes through has a ring for each. From that each model gets the plan that is its own, within a budget that
the other's transformer is taken off, so that neither takes the other's room. Pure arithmetic, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from ..errors import RequestError
from .plan import Plan
from .planner import follow
from .sizes import ModelSizes


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """The plan of two models together, and the plan of each, which has the same placement."""

    both: Plan
    base: Plan
    turbo: Plan


def plan_pair(base: ModelSizes, turbo: ModelSizes, make: Callable[[ModelSizes], Plan]) -> PairPlan:
    """The plan that `make` finds for two models that share text encoder and autoencoder, and each model's own.

    Raises what `make` raises, and `RequestError` for models that are not built alike.
    """
    plan = make(pair_sizes(base, turbo))
    return PairPlan(both=plan, base=_own(plan, base), turbo=_own(plan, turbo))


def pair_sizes(base: ModelSizes, turbo: ModelSizes) -> ModelSizes:
    """Both models as one: shared parts once, and of the transformers each block with its counterpart.

    A ring's places are counted for both, those of the text encoder's layers for both too where these are larger than a
    block; the released models' are smaller.
    """
    if (len(base.blocks), len(base.context_blocks)) != (len(turbo.blocks), len(turbo.context_blocks)):
        raise RequestError(
            f"the transformers have {len(base.blocks)} and {len(turbo.blocks)} blocks; one plan is for two of the same "
            "depth. Load each with a memory of its own, and make a Relay of them"
        )
    return replace(
        base,
        blocks=_sums(base.blocks, turbo.blocks),
        context_blocks=_sums(base.context_blocks, turbo.context_blocks),
        packed_blocks=_sums(base.packed_blocks, turbo.packed_blocks),
        packed_context=_sums(base.packed_context, turbo.packed_context),
        transformer_rest=base.transformer_rest + turbo.transformer_rest,
        in_bfloat16=base.in_bfloat16 and turbo.in_bfloat16,
    )


def _own(both: Plan, sizes: ModelSizes) -> Plan:
    """The plan of one of two models: the placement of `both`, and the budget less what the other one holds."""
    alone = follow(both, sizes, both.work.dtype)
    # In the decode, which needs the same of either model beside the weights.
    whole, part = both.stages[-1], alone.stages[-1]
    budget = replace(
        both.budget,
        device=both.budget.device - (whole.device - part.device),
        host=None if both.budget.host is None else both.budget.host - (whole.host - part.host),
    )
    return replace(follow(replace(alone, budget=budget), sizes, both.work.dtype), rejected=())


def _sums(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(pair) for pair in zip_longest(one, other, fillvalue=0))
