"""Back to before the trouble: what a run does once too many updates in a row were not finite.

The state, the ladder, the metrics and the position in the data go back to the newest checkpoint that was saved while
updates were good, or to the start of the run if nothing was saved yet. Then either the same data are read again (good
against a fault of the hardware: the same numbers come out otherwise), or, with `rollback.skip_data`, those after the
last step that failed: the state's steps go on as before, the data are ahead of them from there on, and later
checkpoints know by how much. Every process reads the same metrics, so all of them go back at the same step.

Source: Chowdhery et al. 2022, PaLM (arXiv 2204.02311), section 5.1: restart from a checkpoint before a loss spike and
skip the batches around it. Differs from the paper: the trigger is a loss or gradient that is not finite, not a spike.
"""

import logging

import jax

from moe.train import manifest
from moe.train.events import ROLLBACK
from moe.train.failures import Damaged, NotFinite
from moe.train.session import SKIPPED_IN_ROW, Session
from moe.train.state import TrainState
from moe.train.storage import CHECKPOINTS, whole_steps
from moe.train.together import the_same

log = logging.getLogger(__name__)


def roll_back(session: Session, failure: NotFinite) -> TrainState:
    """The state to go on from; raises `failure`, with why, if the run may not go back or has nowhere to go."""
    config, taken = session.config.rollback, session.rollbacks + 1
    if taken > config.times:
        said = f"; rollback.times = {config.times} are used up" if config.times else ""
        raise NotFinite(f"{failure}{said}", failure.step)
    good, troubled = _checkpoints(session)
    if troubled and not good:
        raise NotFinite(f"{failure}; every checkpoint is from within the trouble: none to go back to", failure.step)
    for step in troubled:
        if step > max(good):
            log.warning("checkpoint %d was saved after a skipped update and is deleted", step)
            session.checkpoints.forget(step)
    after = failure.step + session.offset
    state = session.start()
    step = int(state.step)
    if int(state.skipped_in_row):  # a checkpoint of the time before they said so
        raise NotFinite(f"{failure}; checkpoint {step} is from within the trouble", failure.step)
    session.rollbacks = taken
    first = step + session.offset + 1
    if config.skip_data:
        session.loader.seek(after)
        session.offset = after - step
    what = f"steps {first} to {after} of the data are {'skipped' if config.skip_data else 'read again'}"
    say = log.warning if jax.process_index() == 0 else log.info
    say("%s", failure)
    say("rollback %d of %d: from step %d back to step %d; %s", taken, config.times, failure.step, step, what)
    session.events.write(
        ROLLBACK, failure.step, to=step, rollbacks=taken, data=[first, after], data_skipped=config.skip_data
    )
    return state


def _checkpoints(session: Session) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints that were saved after a good update, and of those after a skipped one."""

    def look() -> list[list[int]]:
        steps = {step: _skipped_in_row(session, step) for step in whole_steps(session.workdir)}
        return [[step for step, row in steps.items() if not row], [step for step, row in steps.items() if row]]

    good, troubled = the_same(look, f"the checkpoints in {session.workdir / CHECKPOINTS}")
    return good, troubled


def _skipped_in_row(session: Session, step: int) -> int:
    try:
        found: int = manifest.read(session.workdir / CHECKPOINTS / str(step)).data.get(SKIPPED_IN_ROW, 0)
    except (Damaged, OSError):
        return 0  # restoring will find it, say so and go past it
    return found
