"""What a campaign has done so far: `faults.jsonl`, a line for every fault and one for every run that ended."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

from tests.faults.kinds import KINDS
from tests.faults.verdicts import Fault


class Journal:
    """The faults of finished runs; those of a run that the campaign did not see end are done again.

    Commands with different kinds may share a folder, at the same time.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._path = folder, folder / "faults.jsonl"

    @property
    def faults(self) -> list[Fault]:
        """Those of the runs that came to their end."""
        lines = self._path.read_text().split("\n") if self._path.is_file() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        closed = {entry["closed"] for entry in found if "closed" in entry}
        return [Fault(**entry) for entry in found if entry.get("run") in closed]

    def begin(self) -> int:
        """The number of a new run, which no other gets."""
        index = 0
        while True:
            try:
                (self._folder / f"run-{index:02}.begun").touch(exist_ok=False)
                return index
            except FileExistsError:
                index += 1

    def note(self, fault: Fault) -> None:
        self._append(dataclasses.asdict(fault))

    def close(self, index: int) -> None:
        """Run `index` came to its end."""
        self._append({"closed": index})

    def left(self, counts: dict[str, int]) -> dict[str, list[tuple[int, str]]]:
        """Number and kind of the faults that are still wanted, by the group of their kind."""
        done = Counter(fault.kind for fault in self.faults)
        found: dict[str, list[tuple[int, str]]] = {}
        for kind, count in counts.items():
            found.setdefault(KINDS[kind].group, []).extend((number, kind) for number in range(done[kind], count))
        return {group: wanted for group, wanted in found.items() if wanted}

    def _append(self, entry: dict[str, object]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
