"""What every backend is: a typed config that turns a job into files to write and commands to run."""

import abc
import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training run, whatever starts it: `python -m launch.train SPEC --workdir WORKDIR *words`."""

    spec: str
    """Config file, with `:function` if it is not `get_config`."""
    workdir: str
    words: tuple[str, ...] = ()
    """The command line's overrides of the run's config, checked before anything is submitted."""

    @property
    def command(self) -> tuple[str, ...]:
        return ("python", "-m", "launch.train", self.spec, "--workdir", self.workdir, *self.words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteFile:
    """A file that the backend makes: a batch script, a manifest."""

    path: Path
    text: str

    def __str__(self) -> str:
        return f"# {self.path}\n{self.text.rstrip()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command that the backend runs on this machine."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


Action = WriteFile | Command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend(abc.ABC):
    """Where a job runs. Fields are what the command line sets; none has the name of a field of RunConfig."""

    same_files: ClassVar[bool] = False
    """Whether the job sees this machine's files, so that its workdir and its data can be looked at before it starts."""

    dry_run: bool = False
    """Print exactly what would be written and run, and stop."""

    @abc.abstractmethod
    def problems(self) -> Iterator[tuple[str, str]]:
        """(field, what is wrong with it), as in every config."""

    @abc.abstractmethod
    def actions(self, job: Job) -> tuple[Action, ...]:
        """What is written and run, in this order; touches nothing."""
