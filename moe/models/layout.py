"""Which layers are dense and which hold experts, grouped into stacks that a `lax.scan` can run."""

from typing import NamedTuple

DENSE, MOE = "dense", "moe"


class Stack(NamedTuple):
    """`repeats` times the same `pattern` of layer kinds: one scan."""

    pattern: tuple[str, ...]
    repeats: int


def layer_kinds(num_layers: int, dense_layers: int, moe_every: int) -> tuple[str, ...]:
    """Kind of every layer: `dense_layers` dense ones, then periods of `moe_every` layers whose last is MoE."""
    rest = range(num_layers - dense_layers)
    return (DENSE,) * dense_layers + tuple(MOE if (i + 1) % moe_every == 0 else DENSE for i in rest)


def stacks(num_layers: int, dense_layers: int, moe_every: int) -> tuple[Stack, ...]:
    """The layers as scans: leading dense layers, whole periods, and what is left of a last period."""
    periods, left = divmod(num_layers - dense_layers, moe_every)
    period = (DENSE,) * (moe_every - 1) + (MOE,)
    found = (Stack((DENSE,), dense_layers), Stack(period, periods), Stack((DENSE,), left))
    return tuple(stack for stack in found if stack.repeats)
