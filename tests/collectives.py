"""What a compiled program sends between devices, read from its text."""

import functools
import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|\w+_computations?)=\{?((?:%?[\w.\-]+(?:, )?)+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Sent(NamedTuple):
    kind: str
    array: str
    """Dtype and number of elements, as in `s32 24`: XLA adds and removes dimensions of 1."""
    times: int
    """How often a step executes it."""


def collectives(program: str) -> Counter[Sent]:
    """Every array that a collective of the optimised program sends, one entry per operand of a combined collective."""
    bodies: dict[str, list[str]] = {}
    entry = ""
    for line in program.splitlines():
        if (header := _HEADER.match(line)) is not None:
            name = header[2]
            bodies[name] = []
            entry = name if header[1] else entry
        elif line.startswith(" "):
            bodies[name].append(line)

    @functools.cache
    def inside(name: str) -> Counter[Sent]:
        total: Counter[Sent] = Counter()
        for line in bodies[name]:
            if (found := _INSTRUCTION.match(line)) is None:
                continue
            shape, kind = found.groups()
            assert kind.removesuffix("-start") in KINDS or not any(kind.startswith(known) for known in KINDS), kind
            if kind in KINDS:
                total.update(Sent(kind, _array(*array), 1) for array in _ARRAY.findall(shape))
                continue
            for called in _CALLED.findall(line):
                for callee in re.findall(r"[\w.\-]+", called):
                    total.update(_repeat(inside(callee) if callee in bodies else Counter(), kind, line))
        return total

    return inside(entry)


def _array(dtype: str, dimensions: str) -> str:
    return f"{dtype} {math.prod(int(n) for n in dimensions.split(',') if n)}"


def _repeat(found: Counter[Sent], kind: str, line: str) -> Counter[Sent]:
    if kind != "while" or not found:
        return found
    trips = _TRIPS.search(line)
    assert trips is not None, f"a loop of unknown length sends something: {line[:200]}"
    out: Counter[Sent] = Counter()
    for sent, count in found.items():
        out[sent._replace(times=sent.times * int(trips[1]))] += count
    return out


def elements(sent: Counter[Sent]) -> int:
    """Array elements sent in one step."""
    return sum(count * one.times * int(one.array.split()[1]) for one, count in sent.items())
