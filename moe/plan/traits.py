"""What the planner needs to know of a sublayer, read off its config and the logical axes of its parameters.

A new sublayer needs no entry here: products per token are `SublayerConfig.multiply_adds`, what is cut by what follows
from the axes its parameters were declared with, and the rows of experts from the parameters on the axis `experts`.
"""

import functools
import math
from typing import Any, NamedTuple

from moe.layers.base import SublayerConfig
from moe.models import DecoderConfig
from moe.plan.workload import Grid, Weights, of_sublayer, places, weights

_HEADS = ("heads", "kv_heads", "expert_heads", "expert_kv_heads")
_WIDTHS = ("embed", "expert_embed")


class Trait(NamedTuple):
    """One sublayer of a stack's pattern, of which the model has `repeats`."""

    config: SublayerConfig
    repeats: int
    weights: tuple[Weights, ...]
    dense_multiply_adds: float
    """Of one token's forward pass, routed experts apart."""
    expert_multiply_adds: float
    """Of the experts that one token selects."""
    rows_per_token: float
    """Rows that experts compute for a token: K."""
    num_experts: int
    expert_hidden: int
    """F; 0 without routed experts."""
    exchange: Any
    """Config of what brings rows to experts; None: nothing does."""
    capacity_factor: float | None
    """Rows of the experts' buffers over the rows that are expected; None: as many as there are."""
    query_width: int
    """Elements a token's queries have; 0 without attention."""
    kv_width: int
    """Elements of its keys and values together."""
    mixed_width: int
    """Elements of what attention mixes for it."""
    num_heads: int
    head_norm: bool
    """Whether queries and keys are normalised."""
    attend_chunk: int
    """Positions whose scores exist at a time; 0: all."""
    hidden: int
    """Widths of a dense MLP or a shared expert."""

    @property
    def sends_rows(self) -> bool:
        """Whether rows travel to their experts, instead of whole tokens."""
        return hasattr(self.exchange, "budget")

    @property
    def budget(self) -> float | None:
        """Rows that a device may send over those that are balanced; None: whatever it takes."""
        return getattr(self.exchange, "budget", None)

    @property
    def index_arrays(self) -> int:
        """int32 arrays of a number per assignment that every remat policy keeps: the expert, and a queue of rows."""
        return 4 if self.sends_rows else 1

    def reserved(self, grid: Grid) -> float:
        """Rows that a device reserves over the balanced ones."""
        ranks, slices = grid.sizes["expert"], grid.sizes["expert_tensor"]
        if ranks * slices == 1:
            return self.capacity_factor or 1.0
        if not self.sends_rows:  # tokens of all ranks, whatever they chose
            return float(ranks * slices)
        return slices * float(ranks if self.budget is None else min(self.budget, ranks))


@functools.lru_cache(maxsize=64)
def traits(model: DecoderConfig, seq_len: int) -> tuple[Trait, ...]:
    """Of every sublayer of every pattern, in order."""
    found = weights(model)
    return tuple(
        _trait(config, repeats, tuple(of_sublayer(found, stack, place)), model.width, seq_len)
        for stack, place, config, repeats in places(model)
    )


@functools.lru_cache(maxsize=64)
def rest(model: DecoderConfig) -> tuple[Weights, ...]:
    """Parameters outside the stacks: embedding, head, final norm and the like."""
    return tuple(one for one in weights(model) if one.stack is None)


def head_multiply_adds(model: DecoderConfig) -> float:
    """Of one token: the logits of the next token, and of those further ahead."""
    logits = model.width * model.vocab_size
    return logits + (model.ahead.multiply_adds(model.width, model.vocab_size) if model.ahead is not None else 0)


def _trait(config: SublayerConfig, repeats: int, own: tuple[Weights, ...], width: int, seq_len: int) -> Trait:
    routed = sum(w.size for w in own if w.routed)
    expert_ma = routed * config.active_share
    query = mixed = kv = heads = 0
    for w in own:
        if not set(w.axes) & set(_HEADS) or len(w.axes) != 3:
            continue
        if w.axes[-1] in _WIDTHS:
            mixed += math.prod(w.shape[:-1])
        elif "kv_heads" in w.axes:
            kv += math.prod(w.shape[1:])
        elif "query" in w.name:
            query, heads = query + math.prod(w.shape[1:]), heads + w.shape[1]
    dispatch: Any = getattr(config, "dispatch", None)
    attend: Any = getattr(config, "attend", None)
    experts = next((w for w in own if w.routed), None)
    return Trait(
        config=config,
        repeats=repeats,
        weights=own,
        dense_multiply_adds=max(0.0, config.multiply_adds(width, seq_len) - expert_ma),
        expert_multiply_adds=expert_ma,
        rows_per_token=config.active_share * config.routed_experts,
        num_experts=config.routed_experts,
        expert_hidden=experts.shape[experts.axes.index("expert_mlp")]
        if experts and "expert_mlp" in experts.axes
        else 0,
        exchange=getattr(dispatch, "exchange", getattr(config, "exchange", None)),
        capacity_factor=getattr(dispatch, "capacity_factor", None),
        query_width=query,
        kv_width=kv or query + mixed if query else 0,  # without heads of their own, keys are as wide as queries
        mixed_width=mixed,
        num_heads=heads,
        head_norm=getattr(config, "head_norm", "none") != "none",
        attend_chunk=0 if attend is None or attend.method == "whole" else attend.chunk,
        hidden=sum(w.shape[-1] for w in own if "mlp" in w.axes and w.axes[-1] == "mlp") // 2,
    )
