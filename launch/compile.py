"""Compile a config's train step for chips that are not here, and say what it takes:

    python -m launch.compile CONFIG.py[:function] --topology v5p:4x4x8 [--json FILE] [--hlo FILE] [--dropless]
                             [--any.field VALUE ...]

Topologies: [SLICES*]CHIP:SHAPE, as in v5p:4x4x8, v6e:16x16, tpu7x:4x4x4, 2*v5e:16x16 (libtpu must be installed) and
h200:HOSTSxDEVICES (the CUDA plugin). Prints the memory of one device by kind against what the chip has, FLOPs, what is
sent over which axes, and what compiling took. --dropless compiles with an exchange that drops nothing, whose buffer
holds the worst case. Nothing is run and no data is read. Exit status: 0 it fits, 1 it does not, 2 a mistake.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli import one_line_errors, run_config, without_config
from moe.config import ConfigError, check

if TYPE_CHECKING:
    from moe.train.run import RunConfig

USAGE = (
    "usage: python -m launch.compile CONFIG.py[:function] --topology CHIP:SHAPE [--json FILE] [--field.path VALUE ...]"
)
FLAGS = ("--topology", "--json", "--hlo")
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so that two compilations can share a machine
    "TPU_SKIP_MDS_QUERY": "1",  # ask no cloud which TPU this is
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no GPU, no driver to check
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
"""What libtpu and the CUDA plugin read: with no device of theirs they complain on stderr, or refuse to start twice."""


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if (status := without_config(words, __doc__, USAGE)) is not None:
        return status
    with one_line_errors():
        spec, given, rest = words[0], *_take(words[1:])
        if "--topology" not in given:
            raise ConfigError(f"topology: --topology is missing; {USAGE}")
        quietly()
        from launch.compile_report import report, show
        from moe.plan import topology

        asked = topology.parse(given["--topology"])
        config = configured(spec, rest, dropless="--dropless" in given)
        found, text = report(config, asked, topology.devices(asked))
        found |= {"config": spec, "changes": rest}
    if (path := given.get("--json")) is not None:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
    if (path := given.get("--hlo")) is not None and text:
        Path(path).write_text(text)
    show(found)
    return 0 if found["fits"] else 1


def quietly() -> None:
    """Has JAX run nothing but the CPU, and compilers for what is not here say nothing of it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")


def configured(spec: str, words: Sequence[str], dropless: bool) -> "RunConfig":
    """The config of the file with the words applied, and, if asked for, exchanges that drop nothing."""
    config = run_config(spec, words, "python -m launch.compile")
    if dropless:
        config = without_drops(config)
        check(config)
    return config


def without_drops(config: Any) -> Any:
    """The config with no budget on any exchange of rows, wherever it stands: buffers that hold whatever comes."""
    from moe.dispatch.all_to_all import AllToAllConfig

    def one(value: Any) -> Any:
        if isinstance(value, AllToAllConfig):
            return dataclasses.replace(value, budget=None, on_overflow=AllToAllConfig.on_overflow)
        return without_drops(value) if dataclasses.is_dataclass(value) else value

    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        changes[field.name] = tuple(map(one, value)) if isinstance(value, tuple) else one(value)
    return dataclasses.replace(config, **changes)


def _take(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This command's own flags with their values, and the other words."""
    given: dict[str, str] = {}
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word == "--dropless":
            given[word] = "True"
        elif name in FLAGS:
            if not equals and (not words or words[0].startswith("--")):
                raise ConfigError(f"{name.lstrip('-')}: {name} needs a value")
            given[name] = value if equals else words.pop(0)
        else:
            rest.append(word)
    return given, rest


if __name__ == "__main__":
    sys.exit(main())
