"""What a checkpoint says of itself: the data position, and of every leaf its type, shape and checksum.

It is the checkpoint's JSON item `data`, with a digest of its own:

    {"data": ..., "bits_per_byte": ..., "leaves": {PATH: [dtype, shape, checksum]}, "sha256": ...}
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe.config import ConfigError
from moe.train.checksums import checksums, names
from moe.train.failures import Damaged

ITEM = "data"
METRIC = "bits_per_byte"
_DIGEST = "sha256"


class Manifest(NamedTuple):
    data: dict[str, Any]
    """Where the run stood: the loader's state and the ladder's."""
    leaves: dict[str, Any] | None
    """[dtype, shape, checksum] by path; None for a checkpoint of the time before there were checksums."""

    def check_fits(self, abstract: Any) -> None:
        """ConfigError if a leaf that is wanted was saved with another shape or type, or not at all."""
        if self.leaves is None:
            return
        for name, leaf in zip(names(abstract), jax.tree.leaves(abstract), strict=True):
            here, there = _kind(leaf), self.leaves.get(name, [None])[:2]
            if here != there:
                held = "has no such leaf" if there == [None] else f"holds {_words(there)}"
                raise ConfigError(f"{name} is {_words(here)} by the config, the checkpoint {held}")

    def check_values(self, tree: Any) -> None:
        """Damaged if a leaf is not what was saved. With several processes all must call it."""
        if self.leaves is None:
            return
        found = checksums(tree)
        wrong = [name for name, value in found.items() if value != self.leaves[name][2]]
        if wrong:
            more = f" and {len(wrong) - 1} more differ" if len(wrong) > 1 else " differs"
            raise Damaged(f"leaf {wrong[0]}{more} from what was saved (checksum)")


def seal(data: dict[str, Any], bits_per_byte: float | None, state: Any) -> dict[str, Any]:
    """The JSON item to save with `state`. With several processes all must call it."""
    leaves, values = jax.tree.leaves(state), checksums(state)
    body = {
        "data": data,
        METRIC: bits_per_byte,
        "leaves": {name: [*_kind(leaf), values[name]] for name, leaf in zip(names(state), leaves, strict=True)},
    }
    return body | {_DIGEST: _digest(json.loads(json.dumps(body)))}


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`; Damaged if it is not as it was written."""
    path = folder / ITEM / "metadata"
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # not UTF-8, or not JSON
        raise Damaged(f"{_short(path)} is not readable ({error})") from error
    if not isinstance(found, dict):
        raise Damaged(f"{_short(path)} is not a JSON object")
    if _DIGEST not in found and "leaves" not in found:
        return Manifest(found, None)
    if _digest({name: value for name, value in found.items() if name != _DIGEST}) != found.get(_DIGEST):
        raise Damaged(f"{_short(path)} differs from what was saved (checksum)")
    _check_metric(folder, found[METRIC])
    return Manifest(found["data"], found["leaves"])


def read_metric(folder: Path) -> float | None:
    """The validation bits per byte by which Orbax keeps the best checkpoints; Damaged if it cannot be read."""
    path = folder / "metrics" / "metrics"
    if not path.is_file():
        return None
    try:
        return float(json.loads(path.read_text())[METRIC])
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{_short(path)} is not readable ({error})") from error


def _check_metric(folder: Path, saved: float | None) -> None:
    found = read_metric(folder)
    if repr(found) != repr(None if saved is None else float(saved)):  # not a number equals itself here
        raise Damaged(f"{_short(folder / 'metrics' / 'metrics')} says {found} where {saved} was saved")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _kind(leaf: Any) -> list[Any]:
    return [str(leaf.dtype), list(leaf.shape)]


def _words(kind: Any) -> str:
    return f"{kind[0]}{kind[1]}"


def _short(path: Path) -> str:
    """The file as seen from the folder of the checkpoint."""
    return "/".join(path.parts[-2:])
