"""One injected fault, what came of it, and whether that is what the documents say.

Steps lost are the steps that were recorded and had to be run again: the last recorded one minus the one at which the
run went on. They may be the save interval. One interval more is allowed where the save of the last multiple of the
interval was not complete when the processes were gone (it was under way, or had not begun), and one more where the
fault destroyed the newest checkpoint. A run that was asked to end may lose none.
"""

import dataclasses
import re

from tests.faults.kinds import KINDS
from tests.faults.tiny import EVERY


@dataclasses.dataclass(kw_only=True)
class Fault:
    """What was done and what was seen; `problems` is filled in by `judge`."""

    kind: str
    run: int
    number: int
    target: str
    last: int
    """Last step that was recorded when the processes were gone."""
    complete: list[int]
    """Checkpoints that were complete then, before anything was damaged."""
    resumed: int | None = None
    """Step at which the run went on."""
    damaged: list[int] = dataclasses.field(default_factory=list)
    """Checkpoints that the run found damaged, named and moved away."""
    hit_save: bool = False
    """A save was left unfinished."""
    status: int | None = None
    """Exit status of the one command, if it ended."""
    ended_s: float = 0.0
    """Seconds until the other processes had ended, or the command."""
    seconds: float = 0.0
    """Seconds from the fault (or, after a repair, from the next start) to the first new step."""
    said: list[str] = dataclasses.field(default_factory=list)
    """Lines of the log that say what happened."""
    equal: bool = False
    """Every step up to here is recorded once, and all but the times as in the reference run."""
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def lost(self) -> int:
        """Steps that had to be run again."""
        return self.last - (self.last if self.resumed is None else self.resumed)

    @property
    def allowed(self) -> int:
        """Steps that may be lost."""
        kind = KINDS[self.kind]
        if kind.loses_nothing:
            return 0
        cut_off = max(self.complete, default=0) < (self.last - 1) // EVERY * EVERY
        return EVERY * (1 + cut_off + bool(self.damaged)) + kind.more_steps


def judge(fault: Fault) -> Fault:
    """The fault with everything that is not as documented."""
    kind, found = KINDS[fault.kind], []
    if kind.resumes and fault.status != 0:
        usable = [step for step in fault.complete if step not in fault.damaged]
        wanted = max(usable, default=0)
        if fault.resumed is None:
            found.append("did not go on")
        elif fault.resumed != wanted:
            found.append(f"went on at step {fault.resumed}, its newest good checkpoint was {wanted}")
    if fault.lost > fault.allowed:
        found.append(f"lost {fault.lost} steps, {fault.allowed} are allowed")
    if not fault.equal:
        found.append("its curve is not that of the reference run")
    if kind.status is not None and fault.status != kind.status:
        found.append(f"ended with status {fault.status}, not {kind.status}")
    if kind.message and not any(re.search(kind.message, line) for line in fault.said):
        found.append(f"did not say {kind.message!r}")
    if fault.damaged and not kind.damages:
        found.append(f"found checkpoint {fault.damaged} damaged, which nobody had touched")
    if kind.ends_within_s and fault.ended_s > kind.ends_within_s:
        found.append(f"the others took {fault.ended_s:.1f} s to end, {kind.ends_within_s:g} are allowed")
    if kind.hits_save and not fault.hit_save:
        found.append("no save was under way")
    fault.problems += found
    return fault
