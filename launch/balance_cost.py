"""What statistics and balancing cost:  python -m launch.balance_cost [--pairs N] [--out PATH] [--num-experts N ...]

Times whole train steps with and without, one after the other in pairs of random order, so that a machine that slows
down slows down both. "With": the balance rules of the comparison, the statistics and every metric of the step.
"Without": no rule, and no metric but loss and gradient norm, so that XLA removes the statistics as dead code. The
control times the same program twice: its interval shows what the machine can tell apart. Prints a table and writes
PATH.md and PATH.json.
"""

import dataclasses
import datetime
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.cli import one_line_errors, parse
from moe import axes
from moe.axes import MeshConfig
from moe.balance import BalanceRule, LoadBalanceConfig, ZLossConfig
from moe.config import at_least, check
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.routing.topk import TopKConfig
from moe.train.loss import Arrays
from moe.train.run import RunConfig
from moe.train.state import TrainState, create_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, jit_step, make_step

LIMIT = 1.02
"""Ratio that statistics and balancing must stay below."""
TRAINED = ("params", "opt_state", "step", "skipped", "skipped_in_row")
"""What a step without statistics still moves; the rest of the state stays as it was."""
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the cost of statistics and balancing."""

    pairs: int = 40
    """Pairs of steps per comparison."""
    warmup: int = 3
    """Steps of either program before them."""
    out: str = "docs/results/balance-cost"
    """Where the results go, without suffix."""
    seed: int = 0
    """Seed of the tokens, the parameters and the order within a pair."""
    num_experts: int = 64
    """E."""
    num_selected: int = 4
    """K, experts per token."""
    expert_hidden: int = 32
    """F, hidden width of an expert."""
    width: int = 128
    """D."""
    num_layers: int = 2
    """L, all of them with experts."""
    seq_len: int = 128
    """S, tokens of a sequence."""
    batch_size: int = 8
    """Sequences in the global batch."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, pairs=2, warmup=1, seed=0, batch_size=2, seq_len=2)
        if self.batch_size % 2:
            yield "batch_size", "must be even: it is cut into 1 and into 2 micro-batches"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two steps that are timed in pairs; None is the step without rules, statistics and their metrics."""

    label: str
    accumulation: int
    one: tuple[BalanceRule, ...] | None
    other: tuple[BalanceRule, ...] | None = None
    limit: float | None = LIMIT
    """Ratio to stay below; None: only reported."""


def rules(how: Any = "exact") -> tuple[BalanceRule, ...]:
    return LoadBalanceConfig(accumulation=how), ZLossConfig(coefficient=1e-4)


COMPARISONS = (
    Comparison(label="control: without / without", accumulation=1, one=None, limit=None),
    Comparison(label="global / without", accumulation=1, one=rules()),
    Comparison(label="global, buffer / without", accumulation=2, one=rules("buffer")),
    Comparison(label="global, lagged / without", accumulation=2, one=rules("lagged")),
    Comparison(label="global, exact / buffer", accumulation=2, one=rules(), other=rules("buffer"), limit=None),
)


def main(words: list[str] | None = None) -> int:
    with one_line_errors():
        arguments = parse(Arguments, sys.argv[1:] if words is None else words, "python -m launch.balance_cost")
        check(arguments)
        for comparison in COMPARISONS:
            check(run_config(arguments, comparison.accumulation, comparison.one or ()))
    found = measure(arguments)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(found))
    print(page(found))
    return 0


def run_config(arguments: Arguments, accumulation: int, balance: tuple[BalanceRule, ...]) -> RunConfig:
    return RunConfig(
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        accumulation=accumulation,
        balance=balance,
        mesh=MeshConfig(data=1),
        model=DecoderConfig(
            width=arguments.width,
            num_layers=arguments.num_layers,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_width=max(2, arguments.width // 4)),
            moe=MoEConfig(
                num_experts=arguments.num_experts,
                expert_hidden=arguments.expert_hidden,
                router=TopKConfig(num_selected=arguments.num_selected),
            ),
        ),
    )


@functools.cache
def program(arguments: Arguments, accumulation: int, balance: tuple[BalanceRule, ...] | None) -> tuple[Any, Any, Any]:
    """(compiled train step, a function that makes its state, its batch); without statistics if `balance` is None."""
    config = run_config(arguments, accumulation, balance or ())
    mesh = axes.make_mesh(config.mesh, jax.devices()[:1])
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    with jax.set_mesh(mesh):
        shardings = state_shardings(config, model, tx, mesh)
        batch = axes.sharding(mesh, BATCH_LOGICAL)
        arrays = {name: jax.device_put(value, batch) for name, value in tokens(arguments, accumulation).items()}
        if balance is None:
            step = jax.jit(without_statistics(make_step(config, model, tx)), donate_argnums=0)
        else:
            step = jit_step(config, model, tx, mesh, shardings)
        make = functools.partial(create_state, config, tx, shardings)
        return step.lower(make(), arrays).compile(), make, arrays


class Timed:
    """A train step with a state of its own; calling it takes one step and returns its seconds."""

    def __init__(self, arguments: Arguments, accumulation: int, balance: tuple[BalanceRule, ...] | None):
        self.compiled, make, self.arrays = program(arguments, accumulation, balance)
        self.state = make()

    def __call__(self) -> float:
        begin = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.arrays)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin

    @property
    def flops(self) -> float:
        """As XLA counts them, the body of a loop once."""
        return self.compiled.cost_analysis()["flops"]


Step = Callable[[TrainState, Arrays], tuple[TrainState, dict[str, jax.Array]]]


def without_statistics(step: Step) -> Step:
    """The step with everything that only statistics feed left out of its results; XLA removes what computes it."""

    def plain(state: TrainState, arrays: Arrays) -> tuple[TrainState, dict[str, jax.Array]]:
        after, metrics = step(state, arrays)
        state = dataclasses.replace(state, **{name: getattr(after, name) for name in TRAINED})
        return state, {name: metrics[name] for name in ("loss", "grad_norm")}

    return plain


def tokens(arguments: Arguments, accumulation: int) -> dict[str, np.ndarray]:
    """One batch of random bytes, one document a sequence."""
    rng = np.random.default_rng(arguments.seed)
    shape = (accumulation, arguments.batch_size // accumulation, arguments.seq_len + 1)
    zeros = np.zeros(shape, np.int32)
    return {
        "tokens": rng.integers(0, 256, shape).astype(np.int32),
        "segment_ids": zeros + 1,
        "positions": zeros + np.arange(shape[-1], dtype=np.int32),
        "domains": zeros,
    }


def measure(arguments: Arguments) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "arguments": dataclasses.asdict(arguments),
        "comparisons": [compare(arguments, comparison) for comparison in COMPARISONS],
    }


def compare(arguments: Arguments, comparison: Comparison) -> dict[str, Any]:
    """Seconds of both programs in interleaved pairs, and the median of their ratios with its interval."""
    pair = [Timed(arguments, comparison.accumulation, balance) for balance in (comparison.one, comparison.other)]
    rng = np.random.default_rng(arguments.seed)
    for _ in range(arguments.warmup):
        for timed in pair:
            timed()
    seconds = np.zeros((arguments.pairs, 2))
    for row in seconds:
        for index in rng.permutation(2):
            row[index] = pair[index]()
    ratios = seconds[:, 0] / seconds[:, 1]
    low, high = interval(ratios, rng)
    print(f"{comparison.label}: {np.median(ratios):.4f} [{low:.4f}, {high:.4f}]", file=sys.stderr, flush=True)
    return {
        "label": comparison.label,
        "accumulation": comparison.accumulation,
        "ratio": float(np.median(ratios)),
        "interval": [low, high],
        "limit": comparison.limit,
        "flops_ratio": pair[0].flops / pair[1].flops,
        "seconds": seconds.tolist(),
    }


def interval(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    medians = np.median(rng.choice(values, (RESAMPLES, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def verdict(one: dict[str, Any]) -> str:
    """Whether the whole interval lies on one side of the limit."""
    (low, high), limit = one["interval"], one["limit"]
    if limit is None:
        return "reported"
    return f"below {limit}" if high < limit else f"above {limit}" if low > limit else f"undecided about {limit}"


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    given = found["arguments"]
    flags = " ".join(
        f"--{field.name.replace('_', '-')} {given[field.name]}"
        for field in dataclasses.fields(Arguments)
        if given[field.name] != field.default
    )
    lines = [
        "# What statistics and balancing cost",
        "",
        f"Written by `python -m launch.balance_cost{' ' if flags else ''}{flags}` on {found['date']}:"
        f" {found['machine']}, jax {found['jax']} on {found['device']}, one device.",
        "",
        f"Decoder of width {given['width']}, {given['num_layers']} layers of {given['num_experts']} experts of hidden"
        f" width {given['expert_hidden']}, {given['num_selected']} per token; {given['batch_size']} sequences of"
        f" {given['seq_len']} tokens a step, cut into A micro-batches. Rules: load-balance loss and z-loss.",
        "",
        (__doc__ or "").split("\n\n", 1)[1].split(" Prints a table")[0].replace("\n", " "),
        "",
        f"Ratio: median over {given['pairs']} interleaved pairs of whole train steps, with the 95 % bootstrap interval"
        " of the median. FLOPs: as XLA counts them, the body of a loop once.",
        "",
        "| steps compared | A | ms | ms | ratio | 95 % interval | FLOPs | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found["comparisons"]:
        first, second = 1e3 * np.median(one["seconds"], axis=0)
        low, high = one["interval"]
        lines.append(
            f"| {one['label']} | {one['accumulation']} | {first:.1f} | {second:.1f} | {one['ratio']:.4f}"
            f" | {low:.4f} to {high:.4f} | {one['flops_ratio']:.4f} | {verdict(one)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
