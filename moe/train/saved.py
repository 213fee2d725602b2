"""Reading checkpoints, and whether what was read is what was saved. Nothing here waits for another process.

Orbax's manager and checkpointers meet all processes at a barrier once they have read, so one that cannot read leaves
the others waiting; the handlers beneath them do not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe.config import ConfigError
from moe.train import manifest
from moe.train.failures import Damaged
from moe.train.manifest import Manifest
from moe.train.storage import CHECKPOINTS, whole_steps

_NOT_DAMAGE = (MemoryError, jax.errors.JaxRuntimeError)
"""What may be raised while a good checkpoint is read."""
_LONGEST = 400
"""Characters of an error of Orbax that are repeated."""


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the complete checkpoints, rising; ConfigError if there is none."""
    steps = whole_steps(workdir)
    if not steps:
        raise ConfigError(f"workdir = '{workdir}': holds no complete checkpoint in {CHECKPOINTS}/")
    return steps


def latest_step(workdir: Path) -> int:
    """Step of the newest complete checkpoint; ConfigError if there is none."""
    return saved_steps(workdir)[-1]


def restore_parts(workdir: Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Some top-level entries of a saved state (say `params` and `balance`), without reading the rest.

    Each process reads for itself, so one alone may call it, for its own devices. Damaged if a leaf is not as it was
    saved; ConfigError if it is another model's.
    """
    if step not in (steps := saved_steps(workdir)):
        raise ConfigError(f"step = {step}: {workdir} holds the checkpoints of {', '.join(map(str, steps))}")
    folder = (workdir / CHECKPOINTS / str(step)).absolute()
    wanted = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(abstract, partial_restore=True, restore_args=wanted)
    about, tree = read(folder, abstract, lambda path: ocp.PyTreeCheckpointHandler().restore(path, args=args))
    verify(folder, about, tree)
    found: dict[str, Any] = tree
    return found


def read(folder: Path, abstract: dict[str, Any], restore: Callable[[Path], Any]) -> tuple[Manifest, Any]:
    """Manifest and leaves of the checkpoint in `folder`; Damaged if anything in it cannot be read."""
    try:
        about = manifest.read(folder)
        about.check_fits(abstract)
        return about, restore(folder / "state")
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    except _NOT_DAMAGE:
        raise
    except Exception as error:  # whatever Orbax or tensorstore make of damaged files
        said = str(error) if isinstance(error, Damaged) else f"{type(error).__name__}: {_one_line(error, folder)}"
        raise Damaged(f"checkpoint {folder.name}: {said}") from error


def verify(folder: Path, about: Manifest, tree: Any) -> None:
    """Damaged if leaves on this mesh are not what was saved in `folder`; all processes of the mesh must call it."""
    try:
        about.check_values(tree)
    except Damaged as error:
        raise Damaged(f"checkpoint {folder.name}: {error}") from None


def _one_line(error: Exception, folder: Path) -> str:
    """Its words without what tensorstore adds in brackets, files as seen from the checkpoint."""
    text = " ".join(str(error).split()).replace(f"{folder}/", "").split(" [tensorstore_spec")[0]
    return text if len(text) < _LONGEST else f"{text[:_LONGEST]} ..."
