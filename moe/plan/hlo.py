"""Reads the text of a compiled program: its instructions, and how often a step executes each.

The text is one device's part of the program, so shapes are those of shards. A loop's trip count is the compiler's own
note where there is one (CPU, GPU) and else the constant that the loop's condition compares its counter with (TPU; loops
of `jax.lax.scan` count from 0 by 1).
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|(?:branch|true|false|called)_computations?)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ENDS = ("async-update", "async-done")  # they name the computation that async-start runs


class Array(NamedTuple):
    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.ceil(self.elements * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    name: str
    op: str
    shape: str
    """The result's type as written: an array, or a tuple of them."""
    root: bool
    line: str

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result."""
        return arrays(self.shape)

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in the computation the instruction stands in."""
        start = self.line.index(f" {self.op}(") + len(self.op) + 2
        depth, end = 1, start
        while depth and end < len(self.line):
            depth += {"(": 1, ")": -1}.get(self.line[end], 0)
            end += 1
        return re.findall(r"%([\w.\-]+)", self.line[start : end - 1])

    @property
    def origin(self) -> str:
        """Where in the Python code it comes from: the named scopes, the JAX operation last."""
        found = _OP_NAME.search(self.line)
        return found[1] if found else ""


class Executed(NamedTuple):
    instruction: Instruction
    computation: str
    times: int
    """How often a step executes it; inside a loop of unknown length counted as if it ran once."""
    fused: bool
    """Whether it is part of a fusion, so that its result need not exist in memory."""


class Program:
    """A compiled program's text, taken apart."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.unknown_loops: list[str] = []
        """Names of loops whose trip count the text does not tell."""
        name = ""
        for line in text.splitlines():
            if not line.startswith(" "):
                if (header := _HEADER.match(line)) is not None:
                    name = header[2]
                    self.computations[name] = []
                    self.entry = name if header[1] else self.entry
            elif (found := _INSTRUCTION.match(line)) is not None:
                self.computations[name].append(Instruction(found[2], found[4], found[3], bool(found[1]), line))

    def executed(self) -> Iterator[Executed]:
        """Every instruction that a step executes, with how often; every branch of a conditional counts."""
        times, fused = self._times()
        for name, instructions in self.computations.items():
            if times[name]:
                yield from (Executed(one, name, times[name], name in fused) for one in instructions)

    def _times(self) -> tuple[dict[str, int], set[str]]:
        times: dict[str, int] = defaultdict(int)
        fused: set[str] = set()
        calls = {name: list(self._calls(name)) for name in self.computations}
        callers: dict[str, int] = defaultdict(int)
        for edges in calls.values():
            for callee, _, _ in edges:
                callers[callee] += 1
        ready = [name for name in self.computations if not callers[name]]
        times[self.entry] = 1
        while ready:  # a computation is done when all its callers are
            name = ready.pop()
            for callee, factor, is_fusion in calls[name]:
                times[callee] += times[name] * factor
                if is_fusion or name in fused:
                    fused.add(callee)
                callers[callee] -= 1
                if not callers[callee]:
                    ready.append(callee)
        return times, fused

    def _calls(self, name: str) -> Iterator[tuple[str, int, bool]]:
        for one in self.computations[name]:
            if one.op in _ENDS:
                continue
            factor = self._trips(one) if one.op == "while" else 1
            for called in _CALLED.findall(one.line):
                for callee in re.findall(r"[\w.\-]+", called):
                    if callee in self.computations:
                        yield callee, factor, one.op == "fusion"

    def _trips(self, loop: Instruction) -> int:
        if (known := _TRIPS.search(loop.line)) is not None:
            return int(known[1])
        condition = _CONDITION.search(loop.line)
        body = self.computations.get(condition[1], []) if condition else []
        constants = [int(found[1]) for one in body if (found := _CONSTANT.search(one.line)) is not None]
        if len(constants) == 1 and any("direction=LT" in one.line for one in body):
            return constants[0]
        if loop.name not in self.unknown_loops:
            self.unknown_loops.append(loop.name)
        return 1


def arrays(shape: str) -> list[Array]:
    """The arrays of a type as written in a program."""
    return [
        Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(shape)
    ]
