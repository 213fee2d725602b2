"""Where a train step's time goes:  python -m launch.bench CONFIG.py [--steps N] [--warmup N]

Runs the config's real train step on its real data, traces some steps, and adds up the compiled operations' time by the
named scope they came from. Times the input pipeline alone, without prefetch. Prints a table and one line of JSON. A
share is of the traced operations' time; operations of several threads may overlap: shares and not sums are meant.
"""

import collections
import dataclasses
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from launch.cli import load_function, one_line_errors, parse
from moe import axes
from moe.config import ConfigError, check
from moe.data import TrainLoader, prepare
from moe.plan.flops import train_flops_per_token
from moe.train.place import place
from moe.train.run import RunConfig
from moe.train.state import create_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, jit_step

# The first scope found in an operation's name decides; inner scopes come before the outer ones they lie in.
PARTS = {
    "expert matmuls": ("/experts",),
    "routing and dispatch": ("/router", "/dispatch", "/statistics", "/balance", "/prepass"),
    "shared expert and dense MLP": ("/shared_expert", "/mlp"),
    "attention": ("/attention",),
    "loss": ("/loss", "/logits", "(loss)", "(logits)"),
    "optimizer": ("/optimizer",),
}
OTHER = "other (norms, residuals, embedding, layer loop)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure a config's train step."""

    steps: int = 10
    """Steps that are timed."""
    warmup: int = 3
    """Steps before them."""
    traced: int = 3
    """Steps that are traced for the shares."""


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    with one_line_errors():
        if not words or words[0].startswith("-"):
            raise ConfigError("usage: python -m launch.bench CONFIG.py [--steps N] [--warmup N] [--traced N]")
        config = load_function(words[0])
        if not isinstance(config, RunConfig):
            raise ConfigError(f"config = {words[0]!r}: must return a RunConfig, got {type(config).__name__}")
        check(config)
        found = measure(config, parse(Arguments, words[1:], "python -m launch.bench"))
    show(found)
    return 0


def measure(config: RunConfig, arguments: Arguments) -> dict[str, Any]:
    """Median step time, tokens and FLOPs per second, input pipeline time, and the share of each part."""
    corpus = prepare(config.data)
    mesh = axes.make_mesh(config.mesh)
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    B = config.microbatch_size
    loader = TrainLoader(
        corpus, accumulation=config.accumulation, batch_size=B, rows=range(B), seed=0, num_threads=0, prefetch=0
    )
    sharding = axes.sharding(mesh, BATCH_LOGICAL)
    with jax.set_mesh(mesh):
        shardings = state_shardings(config, model, tx, mesh)
        state = create_state(config, tx, shardings)
        batches, input_s = [], []
        for _ in range(4):
            begin = time.perf_counter()
            batches.append(next(loader))
            input_s.append(time.perf_counter() - begin)
        placed = [place(batch, sharding) for batch in batches]
        compiled = jit_step(config, model, tx, mesh, shardings).lower(state, placed[0]).compile()
        step_s = []
        for index in range(arguments.warmup + arguments.steps):
            begin = time.perf_counter()
            state, _ = compiled(state, placed[index % 4])
            jax.block_until_ready(state)
            step_s.append(time.perf_counter() - begin)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for index in range(arguments.traced):
                    state, _ = compiled(state, placed[index % 4])
                jax.block_until_ready(state)
            times = operation_times(Path(folder), compiled.as_text())
    seconds = statistics.median(step_s[arguments.warmup :])
    tokens = config.batch_size * config.data.seq_len
    total = sum(times.values())
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "step_s": seconds,
        "tokens_per_s": tokens / seconds,
        "flops_per_s": tokens * train_flops_per_token(config.model, config.data.seq_len) / seconds,
        "input_s": statistics.median(input_s[1:]),
        "input_share_of_step": statistics.median(input_s[1:]) / seconds,
        "shares": {name: times[name] / total for name in (*PARTS, OTHER)},
    }


def operation_times(folder: Path, program: str) -> dict[str, float]:
    """Seconds of traced operations by part; the compiled program's text says which scope an operation came from."""
    scope = dict(re.findall(r'%?([\w.\-]+) = .*?op_name="([^"]*)"', program))
    trace = max(folder.rglob("*.xplane.pb"))
    times: dict[str, float] = collections.defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                # A loop's own event spans the operations inside it, which are counted by themselves.
                if operation is not None and not str(operation).startswith(("while", "call")):
                    times[part_of(scope.get(str(operation), ""))] += event.duration_ns / 1e9
    if not times:
        raise RuntimeError("the trace holds no operations; this platform's profiler does not report them")
    return times


def part_of(name: str) -> str:
    """The part an operation belongs to, by its scope path."""
    return next((part for part, scopes in PARTS.items() if any(scope in name for scope in scopes)), OTHER)


def show(found: dict[str, Any]) -> None:
    table = Table("part of the step", "share", title=f"{found['device']} x {found['devices']}, jax {found['jax']}")
    for name, share in found["shares"].items():
        table.add_row(name, f"{100 * share:.1f} %")
    table.add_section()
    table.add_row("input pipeline alone, of the step", f"{100 * found['input_share_of_step']:.2f} %")
    Console().print(table)
    print(
        f"{1e3 * found['step_s']:.1f} ms a step,"
        f" {found['tokens_per_s']:,.0f} tokens/s, {found['flops_per_s']:.3g} FLOP/s"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
