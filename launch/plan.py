"""Search the layouts of a config on a number of chips, and say what the best ones take:

    python -m launch.plan CONFIG.py[:function] --chips 256 --chip v5p [--top 5] [--verify 2] [--json FILE]
                          [--spare 0.05] [--space.max-stages 4] [--assume.imbalance 1.5] [--any.field VALUE ...]

Tries every mesh, remat policy and accumulation that the config's own checks accept, with a model of time and memory
(`moe.plan.cost`, `moe.plan.memory`), and prints the fastest that fit; --verify compiles so many of them ahead of time
(libtpu must be installed) and shows compiled memory beside the predicted one. No accelerator is needed, no data read.
Seconds are for ranking layouts: they are worth what --assume says. Exit status: 0, 1 nothing fits, 2 a mistake.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import one_line_errors, parse, run_config, without_config
from launch.compile import QUIET
from moe.config import ConfigError, check

if TYPE_CHECKING:
    from moe.plan.chips import Chip
    from moe.plan.search import Plan
    from moe.plan.workload import Workload
    from moe.train.run import RunConfig

USAGE = (
    "usage: python -m launch.plan CONFIG.py[:function] --chips N --chip NAME [--top N] [--verify N]"
    " [--field.path VALUE ...]"
)


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if (status := without_config(words, __doc__, USAGE)) is not None:
        return status
    with one_line_errors():
        from launch.plan_report import Arguments, plan

        own, rest = split(words[1:], [field.name for field in dataclasses.fields(Arguments)])
        arguments = parse(Arguments, own, "python -m launch.plan")
        check(arguments)
        run = run_config(words[0], rest, "python -m launch.plan")
        return plan(run, arguments, {"config": words[0], "changes": rest})


def split(words: Sequence[str], fields: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words of this command's own flags, words for the config)."""
    own: list[str] = []
    rest: list[str] = []
    target = rest
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].partition(".")[0].replace("-", "_")
            target = own if name in fields else rest
        target.append(word)
    return own, rest


def workload(run: "RunConfig", devices: int) -> "Workload":
    """What a step of the run asks of so many devices."""
    from moe.plan.workload import Workload

    return Workload(
        model=run.model,
        mesh=run.mesh,
        devices=devices,
        batch_size=run.batch_size,
        accumulation=run.accumulation,
        seq_len=run.data.seq_len,
        host_moments=run.optim.offload,
    )


def planned(run: "RunConfig", work: "Workload") -> "RunConfig":
    """The run in the layout of `work`."""
    return dataclasses.replace(run, mesh=work.mesh, accumulation=work.accumulation, model=work.model)


def legal(run: "RunConfig", work: "Workload") -> bool:
    """Whether the run's own checks accept the layout."""
    return next(iter(planned(run, work).problems()), None) is None


def words_of(work: "Workload") -> str:
    """The flags of `launch.train` that ask for this layout."""
    mesh = dataclasses.asdict(work.mesh)
    words = [f"--mesh.{name.replace('_', '-')} {size}" for name, size in mesh.items() if size != 1]
    words += [f"--model.remat {work.model.remat}", f"--accumulation {work.accumulation}"]
    if (pipeline := work.model.pipeline) is not None:  # a config that is None has no flags of its own
        words.append(f"(in the config: model.pipeline=PipelineConfig(microbatches={pipeline.microbatches}))")
    return " ".join(words)


def topology_of(chip: "Chip", chips: int) -> str:
    """The slice with so many chips that is most like a cube; ConfigError with the nearest sizes if there is none."""
    from moe.plan.topology import shapes

    if not chip.axes:
        hosts, rest = divmod(chips, 8)
        return f"{chip.name}:{hosts}x8" if not rest else f"{chip.name}:1x{chips}"
    all_shapes = list(shapes(chip))
    if found := [shape for shape in all_shapes if math.prod(shape) == chips]:
        return f"{chip.name}:{'x'.join(map(str, min(found, key=max)))}"
    sizes = sorted({math.prod(shape) for shape in all_shapes}, key=lambda size: abs(size - chips))
    raise ConfigError(
        f"chips = {chips}: no slice of {chip.name} has so many; the nearest have {sizes[0]} and {sizes[1]}"
    )


def compiled(run: "RunConfig", best: "Plan", topology: str) -> dict[str, Any]:
    """What the compiler says of one plan: bytes at the worst moment, and seconds it took."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")
    from moe.plan.topology import devices, parse
    from moe.train.aot import compile_step

    found = compile_step(planned(run, best.work), devices(parse(topology)))
    peak = found.memory.peak or found.memory.total
    return {
        "compiled_bytes": peak,
        "predicted_over_compiled": best.memory.total / peak,
        "refused": found.refused,
        "compile_s": found.compile_s,
    }


def write(path: str, found: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
