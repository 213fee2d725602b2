"""Start a training run with one command, wherever it runs:

    python -m launch.submit BACKEND CONFIG.py[:function] [--workdir DIR] [--field VALUE ...] [--any.field VALUE ...]

    python -m launch.submit local configs/quickstart.py --processes 2 --devices 4
    python -m launch.submit slurm configs/quickstart.py --workdir runs/a --nodes 4 --gpus-per-node 8 --steps 1000
    python -m launch.submit slurm --help                   every field of a backend with its default and meaning
    python -m launch.train configs/quickstart.py --help    every field of the run

Backends: local (processes of this machine), slurm, gke, tpu-vm. Words that name a field of the backend are for it, all
others change the run's config, which is checked here, before anything is written or submitted. --dry-run prints exactly
what would be written and run, and stops. The same command again resumes the run in its workdir.
"""

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import exits
from launch.cli import load_function, one_line_errors, override, parse, take
from launch.submit.base import Action, Backend, Command, Job, WriteFile
from launch.train import default_workdir
from moe.config import ConfigError, check

BACKENDS = {
    "local": "launch.submit.local:LocalConfig",
    "slurm": "launch.submit.slurm:SlurmConfig",
    "gke": "launch.submit.gke:GkeConfig",
    "tpu-vm": "launch.submit.tpu_vm:TpuVmConfig",
}
USAGE = "usage: python -m launch.submit BACKEND CONFIG.py[:function] [--workdir DIR] [--field VALUE ...]"
HELP = ("-h", "--help")


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in HELP:
        print(f"{__doc__}\n{USAGE}" if words else f"error: {USAGE}", file=sys.stderr)
        return exits.FINISHED if words else exits.MISTAKE
    with one_line_errors():
        kind = backend_type(words[0])
        asks = any(word in HELP for word in words[1:])
        if asks or len(words) == 1 or words[1].startswith("-"):
            if not asks:
                raise ConfigError(f"config: is missing; {USAGE}")
            parse(kind, ["--help"], f"python -m launch.submit {words[0]} CONFIG.py[:function] [--workdir DIR]")
        backend, actions = prepare(kind, words[1], words[2:])
        if backend.dry_run:
            print("\n\n".join(map(str, actions)))
            return exits.FINISHED
        return perform(actions)


def backend_type(name: str) -> type[Backend]:
    if name not in BACKENDS:
        raise ConfigError(f"backend = {name!r}: must be one of {', '.join(BACKENDS)}")
    module, _, kind = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(importlib.import_module(module), kind)
    return found


def prepare(kind: type[Backend], spec: str, words: Sequence[str]) -> tuple[Backend, tuple[Action, ...]]:
    """The backend and what it will do; ConfigError for a mistake in either config. Touches nothing."""
    own, rest = take(words, ("workdir",))
    mine, others = divide(kind, rest)
    backend = parse(kind, mine, "python -m launch.submit")
    check(backend)
    job = Job(spec=spec, workdir=own.get("workdir") or str(default_workdir(spec)), words=tuple(others))
    check_job(job, backend.same_files)
    return backend, backend.actions(job)


def divide(kind: type[Backend], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for the backend and those for the run. A switch may stand without a value: --dry-run."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    found: tuple[list[str], list[str]] = ([], [])
    target, switch = found[1], False
    for word in [*words, "--"]:
        if word.startswith("--"):
            if switch:
                target.append("True")
            name, equals, _ = word[2:].partition("=")
            field = fields.get(name.replace("-", "_"))
            target = found[1] if field is None else found[0]
            switch = field is not None and field.type in (bool, "bool") and not equals
        else:
            switch = False
        target.append(word)
    return found[0], found[1][:-1]


def check_job(job: Job, same_files: bool) -> None:
    """ConfigError if the run would not start: what every process of it would find out, found out once and now."""
    from moe.data import check_inputs
    from moe.train.run import RunConfig
    from moe.train.workdir import check_workdir

    base = load_function(job.spec)
    if not isinstance(base, RunConfig):
        raise ConfigError(f"config = {job.spec!r}: must return a RunConfig, got {type(base).__name__}")
    config = override(base, job.words, "python -m launch.submit")
    if same_files:
        check_workdir(Path(job.workdir), config)
        check_inputs(config.data)


def perform(actions: Sequence[Action]) -> int:
    """Writes and runs; the last command takes this process's place, so that it gets the signals."""
    commands = [action for action in actions if isinstance(action, Command)]
    for command in commands:
        if shutil.which(command.words[0]) is None:
            raise ConfigError(f"{command.words[0]}: is not on this machine; --dry-run shows what would be run")
    for action in actions:
        if isinstance(action, WriteFile):
            action.path.parent.mkdir(parents=True, exist_ok=True)
            action.path.write_text(action.text)
        elif action is not commands[-1]:
            if status := subprocess.run(action.words, check=False).returncode:
                return status
        else:
            sys.stdout.flush()
            os.execvp(action.words[0], action.words)
    return exits.FINISHED


if __name__ == "__main__":
    sys.exit(main())
