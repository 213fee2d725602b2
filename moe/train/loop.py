"""The training loop: data, step, log, evaluate, save. Never reads argv, signals or the environment.

The loop dispatches step n before it reads the metrics of step n - 1, so the device never waits for the host. A step's
record is on disk before a checkpoint of that step is: a run cut off at any moment goes on from its last checkpoint with
no step missing and none doubled.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe import axes
from moe.config import ConfigError, check
from moe.data import Corpus, TrainLoader, prepare
from moe.plan.device_order import in_mesh_order
from moe.train.checkpoint import Checkpoints, latest_step
from moe.train.evaluate import Evaluator, mean_bits_per_byte
from moe.train.load import check_fits, load_config, load_params
from moe.train.metrics import MetricWriter
from moe.train.place import local_rows, place
from moe.train.progress import Progress
from moe.train.record import Pending, Recorder, Trace, describe_balance
from moe.train.run import RunConfig
from moe.train.state import TrainState, create_state, init_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL
from moe.train.steps import Steps
from moe.train.workdir import check_workdir, open_workdir

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How a call of `train` ended."""

    step: int
    finished: bool
    """False if `should_stop` ended it before the last step; the state is saved either way."""


class _Session:
    """What stays the same from the first step to the last."""

    def __init__(self, config: RunConfig, workdir: Path, record: dict[str, Any]):
        check(config)
        check_workdir(workdir, config)
        self.config, self.workdir = config, workdir
        # Everything that can be wrong is asked before the corpus is built and before a device is touched.
        num_tokens = config.data.tokenizer.build("data.tokenizer").vocab_size
        if config.model.vocab_size < num_tokens:
            raise ConfigError(
                f"model.vocab_size = {config.model.vocab_size}: must be at least the {num_tokens} of data.tokenizer"
            )
        self.model = config.model.abstract()
        self.tx = make_optimizer(config, self.model)
        if config.init_from is not None:
            check_fits(Path(config.init_from), config)
        self.mesh = axes.make_mesh(config.mesh, in_mesh_order(config.mesh, jax.devices()))
        self.batch_sharding = axes.sharding(self.mesh, BATCH_LOGICAL)
        self.corpus: Corpus = prepare(config.data)
        with jax.set_mesh(self.mesh):
            self.shardings = state_shardings(config, self.model, self.tx, self.mesh)
            shape = (config.accumulation, config.microbatch_size, config.data.seq_len + 1)
            self._check_batch(shape)
            self.rows = local_rows(self.batch_sharding, shape, 1)
            self.step = Steps(config, self.model, self.tx, self.mesh, self.shardings)
            self.evaluator = Evaluator(config, self.model, self.corpus, self.mesh)
        if jax.process_index() == 0:
            balance = describe_balance(config)
            open_workdir(workdir, config, record | {"data_fingerprint": self.corpus.fingerprint, "balance": balance})
            for name, what in balance.items():
                log.info("balance rule %s: %s", name, what)
        self.checkpoints = Checkpoints(workdir, config.checkpoint)
        self.loader = TrainLoader(
            self.corpus,
            accumulation=config.accumulation,
            batch_size=config.microbatch_size,
            rows=self.rows,
            seed=config.seed,
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
        )

    def start(self) -> TrainState:
        """The state to go on from: the newest checkpoint, another run's parameters, or step 0."""
        found = self.checkpoints.latest_step()
        if found is not None:
            make = lambda: init_state(self.config, self.tx, jax.random.key(0))  # noqa: E731
            state, data = self.checkpoints.restore(found, make, self.shardings)
            self.step.set_state(data)
            self.loader.set_state(data)
            return state
        state = create_state(self.config, self.tx, self.shardings)
        if self.config.init_from is None:
            return state
        source = Path(self.config.init_from)
        params, _ = load_params(source, latest_step(source), load_config(source))
        return dataclasses.replace(state, params=jax.device_put(params, self.shardings.params))

    def batch(self) -> dict[str, jax.Array]:
        """The next global batch, on the mesh."""
        return place(next(self.loader), self.batch_sharding, self.rows, 1, self.config.microbatch_size)

    def save(self, step: int, state: TrainState, bits_per_byte: float | None) -> None:
        self.checkpoints.save(step, state, self.loader.get_state() | self.step.get_state(), bits_per_byte)

    def close(self) -> None:
        self.checkpoints.close()
        self.loader.close()

    def _check_batch(self, shape: tuple[int, ...]) -> None:
        cuts = axes.size(self.mesh, axes.BATCH)
        if shape[1] % cuts:
            raise ConfigError(
                f"batch_size = {self.config.batch_size}: a micro-batch of {shape[1]} sequences must be divisible by the"
                f" {cuts} pieces of data * fsdp"
            )
        model = self.config.model
        if model.pipeline is not None:  # as the config's own check, with `data` known
            for field, limit in model.pipeline.mesh_problems(model.trunk, self.config.mesh.stages, shape[1], cuts):
                raise ConfigError(f"model.{field}: {limit}")


def train(
    config: RunConfig,
    workdir: Path,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    record: dict[str, Any] | None = None,
) -> Outcome:
    """Trains to the last step, or resumes the run in `workdir`; raises ConfigError before anything is written."""
    session = _Session(config, workdir, record or {})
    with jax.set_mesh(session.mesh):
        state = session.start()
        start = int(state.step)
        if start:
            log.info("resumed at step %d", start)
        with Progress(config.steps, start) as progress, MetricWriter(workdir, resume_step=start) as writer:
            try:
                return _run(session, state, writer, progress, should_stop)
            finally:
                session.close()


def _run(
    session: _Session, state: TrainState, writer: MetricWriter, progress: Progress, should_stop: Callable[[], bool]
) -> Outcome:
    config = session.config
    step = int(state.step)
    recorder, trace = Recorder(config, writer, progress), Trace(config.profile, session.workdir / "profile")
    pending: Pending | None = None
    while step < config.steps:
        trace.before(step + 1)
        begin = time.perf_counter()
        arrays = session.batch()
        waited = time.perf_counter() - begin
        step += 1
        state, metrics = session.step(step, state, arrays)
        if pending is not None:
            recorder.write(session.step.observe(recorder.read(pending)))
        pending = Pending(step, metrics, waited)
        trace.after(step, state.step)
        last, stopping = step == config.steps, should_stop()
        evaluates = config.evaluate.every > 0 and (step % config.evaluate.every == 0 or last)
        saves = last or stopping or step % config.checkpoint.every == 0
        if not (evaluates or saves):
            continue
        values, pending, bits_per_byte = session.step.observe(recorder.read(pending)), None, None
        if evaluates:
            results = session.evaluator(state, config.evaluate.max_bytes)
            bits_per_byte = mean_bits_per_byte(results)
            values |= {f"eval/bits_per_byte/{name}": result.bits_per_byte for name, result in results.items()}
            values["eval/bits_per_byte"] = bits_per_byte
        recorder.write(values)
        if saves:
            session.save(step, state, bits_per_byte)
        recorder.restart()
        if stopping and not last:
            progress.note(f"asked to stop: saved step {step}")
            return Outcome(step, False)
    return Outcome(step, True)
