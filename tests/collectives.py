"""What a compiled program sends between devices, as tests compare it."""

from collections import Counter
from typing import NamedTuple

from moe.plan import collectives as read
from moe.plan.hlo import Program


class Sent(NamedTuple):
    kind: str
    array: str
    """Dtype and number of elements, as in `s32 24`: XLA adds and removes dimensions of 1."""
    times: int
    """How often a step executes it."""


def collectives(text: str) -> Counter[Sent]:
    """Every array that a collective of the optimised program sends, one entry per operand of a combined collective."""
    program = Program(text)
    found = Counter(
        Sent(one.kind, f"{one.array.dtype} {one.array.elements}", one.times) for one in read.collectives(program)
    )
    assert not program.unknown_loops, f"loops of unknown length: {program.unknown_loops}"
    return found


def elements(sent: Counter[Sent]) -> int:
    """Array elements sent in one step."""
    return sum(count * one.times * int(one.array.split()[1]) for one, count in sent.items())
