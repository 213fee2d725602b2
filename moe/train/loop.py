"""The training loop: data, step, log, evaluate, save. Never reads argv, signals or the environment.

The loop dispatches step n before it reads the metrics of step n - 1, so the device never waits for the host. A step's
record is on disk before a checkpoint of that step is: a run cut off at any moment goes on from its last checkpoint with
no step missing and none doubled.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe.cluster.group import Group
from moe.train import events
from moe.train.evaluate import mean_bits_per_byte
from moe.train.failures import NotFinite
from moe.train.metrics import MetricWriter
from moe.train.progress import Progress
from moe.train.record import Pending, Recorder, Trace
from moe.train.replicas import check_replicas
from moe.train.rollback import roll_back
from moe.train.run import RunConfig
from moe.train.session import Session, watch
from moe.train.state import TrainState
from moe.train.watchdog import Watchdog

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    step: int
    finished: bool
    """False if `should_stop` ended it before the last step; the state is saved either way."""


def train(
    config: RunConfig,
    workdir: Path,
    *,
    group: Group | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    record: dict[str, Any] | None = None,
    on_stall: Callable[[], None] | None = None,
) -> Outcome:
    """Trains to the last step, or resumes the run in `workdir`; raises ConfigError before anything is written.

    With several processes each calls it, with the `group` that it joined. `should_stop` is asked once a step and must
    say the same in each process. `on_stall` is called by the watchdog's thread once nothing has gone on for
    `watchdog.stop_after_s`: it is to end the process. Without it a stall is only reported.
    """
    session = Session(config, workdir, record or {}, group or Group())
    with jax.set_mesh(session.mesh), contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(watch(session, on_stall))
        stack.callback(session.close)
        stack.callback(watchdog.doing, "finishing the last save")
        watchdog.doing("reading the newest checkpoint")
        state = session.start()
        start = int(state.step)
        if start:
            log.info("resumed at step %d", start)
        if start < config.steps:
            session.events.write(events.RESUMED if start else events.STARTED, start)
        outcome = _to_the_end(session, state, watchdog, should_stop)
    if start < config.steps:
        session.events.write(events.FINISHED if outcome.finished else events.PREEMPTED, outcome.step)
    return outcome


def _to_the_end(
    session: Session, state: TrainState, watchdog: Watchdog, should_stop: Callable[[], bool]
) -> Outcome:  # fmt: skip
    """Runs on from `state`, and again from before the trouble as often as the config allows."""
    while True:
        config, start = session.config, int(state.step)
        with contextlib.ExitStack() as stack:
            writer = progress = None
            if jax.process_index() == 0:
                progress = stack.enter_context(Progress(config.steps, start))
                writer = stack.enter_context(MetricWriter(session.workdir, resume_step=start))
            trace = Trace(config.profile, session.workdir / "profile")
            stack.callback(trace.close)
            try:
                return _run(session, state, Recorder(config, writer, progress), trace, watchdog, should_stop)
            except NotFinite as error:
                failure = error.with_traceback(None)  # lets go of the state: there may be no room for two
        watchdog.doing("going back to before the trouble")
        state = roll_back(session, failure)


def _run(
    session: Session, state: TrainState, recorder: Recorder, trace: Trace, watchdog: Watchdog,
    should_stop: Callable[[], bool],
) -> Outcome:  # fmt: skip
    config = session.config
    step = int(state.step)
    compare_at = step + config.cluster.verify_after
    pending: Pending | None = None

    def numbers(pending: Pending) -> dict[str, Any]:
        watchdog.doing(f"waiting for the numbers of step {pending.step}")
        return session.step.observe(recorder.read(pending)) | session.position(pending.step)

    while step < config.steps:
        trace.before(step + 1)
        begin = time.perf_counter()
        watchdog.doing(f"waiting for the batch of step {step + 1}")
        arrays = session.batch()
        waited = time.perf_counter() - begin
        step += 1
        watchdog.doing(f"beginning step {step}")
        state, metrics = session.step(step, state, arrays)
        if pending is not None:
            recorder.write(numbers(pending))
        pending = Pending(step, metrics, waited)
        trace.after(step, state.step)
        last, stopping = step == config.steps, should_stop()
        evaluates = config.evaluate.every > 0 and (step % config.evaluate.every == 0 or last)
        saves = last or stopping or step % config.checkpoint.every == 0
        if saves or step == compare_at:
            check_replicas(state)
        if not (evaluates or saves):
            continue
        values, pending, bits_per_byte = numbers(pending), None, None
        if evaluates:
            results = session.evaluate(state, watchdog)
            bits_per_byte = mean_bits_per_byte(results)
            values |= {f"eval/bits_per_byte/{name}": result.bits_per_byte for name, result in results.items()}
            values["eval/bits_per_byte"] = bits_per_byte
        recorder.write(values)
        if saves:
            watchdog.doing(f"saving step {step}")
            session.save(step, state, bits_per_byte, values["skipped_in_row"], must=last or stopping)
        recorder.restart()
        if stopping and not last:
            recorder.note(f"asked to stop: saved step {step}")
            return Outcome(step, False)
    return Outcome(step, True)
