"""What a run keeps from its first step to its last: model, mesh, compiled step, data, checkpoints.

Made by all processes of a run together: every stage of it that can go wrong on one host alone is one `Group.agree`.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from moe import axes
from moe.cluster.group import Group
from moe.config import ConfigError, check
from moe.data import Corpus, DataError, TrainLoader, prepare
from moe.plan.device_order import in_mesh_order
from moe.train import exchanges
from moe.train.checkpoint import Checkpoints
from moe.train.evaluate import DomainResult, Evaluator
from moe.train.events import DAMAGED, STALLED, Events
from moe.train.failures import StorageError
from moe.train.load import check_fits, load_config, load_params
from moe.train.lock import Lock
from moe.train.place import from_host, local_rows, place
from moe.train.record import describe_balance
from moe.train.run import RunConfig
from moe.train.saved import latest_step
from moe.train.state import TrainState, create_state, init_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL
from moe.train.steps import Steps
from moe.train.storage import storage_errors
from moe.train.watchdog import Watchdog
from moe.train.workdir import check_shared, check_workdir, open_workdir

log = logging.getLogger(__name__)
T = TypeVar("T")

ROLLBACKS = "rollbacks"
SKIPPED_IN_ROW = "skipped_in_row"
"""Entries of a checkpoint's data: rollbacks so far; updates skipped in a row when it was saved."""


def readable(read: Callable[[], T]) -> Callable[[], T]:
    """`read`, with data that cannot be read as StorageError."""

    def attempt() -> T:
        try:
            return read()
        except DataError as error:
            raise StorageError(str(error)) from error

    return attempt


def watch(session: "Session", on_stall: Callable[[], None] | None) -> Watchdog:
    """A watchdog over the session's steps, which writes in its diary what it ended."""
    note = lambda doing: session.events.write(STALLED, doing=doing)  # noqa: E731
    watchdog = Watchdog(session.config.watchdog, on_stall, note=note)
    session.step.compiles = lambda number: watchdog.doing(f"compiling step {number}", compiling=True)
    return watchdog


class Session:
    """What stays the same from the first step to the last."""

    def __init__(self, config: RunConfig, workdir: Path, record: dict[str, Any], group: Group):
        self.config, self.workdir, self.group = config, workdir, group
        self.lock: Lock | None = None
        """Of the workdir, on process 0."""
        lasting = (ConfigError, StorageError)
        # Everything that can be wrong is asked before the corpus is built and before a device is touched.
        group.agree("its checks", self._check)
        group.agree("its mesh", self._lay_out)
        self.corpus: Corpus = group.agree(
            "the data",
            readable(lambda: prepare(config.data)),
            lambda corpus: {"data fingerprint": corpus.fingerprint},
            one_first=True,
            raises=lasting,
        )
        group.agree("the model on its devices", self._build)
        group.agree("the workdir", lambda: self._open(record), one_first=True, raises=lasting)
        self.events = Events(workdir)
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
        self._evaluated = False
        self.rollbacks = 0
        self.offset = 0
        """Steps that the data are ahead of the state: those that rollbacks skipped."""

    def _check(self) -> None:
        config = self.config
        check(config)
        check_workdir(self.workdir, config)
        num_tokens = config.data.tokenizer.build("data.tokenizer").vocab_size
        if config.model.vocab_size < num_tokens:
            raise ConfigError(
                f"model.vocab_size = {config.model.vocab_size}: must be at least the {num_tokens} of data.tokenizer"
            )
        self.model = config.model.abstract()
        self.tx = make_optimizer(config, self.model)
        if config.init_from is not None:
            check_fits(Path(config.init_from), config)

    def _lay_out(self) -> None:
        self.mesh = axes.make_mesh(self.config.mesh, in_mesh_order(self.config.mesh, jax.devices()))
        self.batch_sharding = axes.sharding(self.mesh, BATCH_LOGICAL)

    def _build(self) -> None:
        config = self.config
        with jax.set_mesh(self.mesh):
            self.shardings = state_shardings(config, self.model, self.tx, self.mesh)
            shape = (config.accumulation, config.microbatch_size, config.data.seq_len + 1)
            self._check_batch(shape)
            self.rows = local_rows(self.batch_sharding, shape, 1)
            self.step = Steps(config, self.model, self.tx, self.mesh, self.shardings)
            self.evaluator = Evaluator(config, self.model, self.corpus, self.mesh)

    def _open(self, record: dict[str, Any]) -> None:
        if jax.process_index() != 0:
            check_shared(self.workdir, self.config)
            return
        balance = describe_balance(self.config)
        more = {"data_fingerprint": self.corpus.fingerprint, "balance": balance}
        try:
            with storage_errors("the workdir cannot be written", self.workdir):
                self.lock = open_workdir(self.workdir, self.config, record | more)
        except OSError as error:
            raise ConfigError(f"workdir = '{self.workdir}': cannot be written ({error.strerror})") from error
        for name, what in balance.items():
            log.info("balance rule %s: %s", name, what)
        for line in exchanges.without_effect(self.config.model, self.mesh.shape):
            log.info("%s", line)

    def start(self) -> TrainState:
        """The state to go on from: the newest checkpoint, another run's parameters, or step 0."""
        make = lambda: init_state(self.config, self.tx, jax.random.key(0))  # noqa: E731
        found = self.checkpoints.restore_newest(make, self.shardings, self._note_damage)
        self.step.set_state({} if found is None else found.data)
        if found is not None:
            self.loader.set_state(found.data)
            self.rollbacks = found.data.get(ROLLBACKS, 0)
            self.offset = self.loader.next_step - found.step
            return found.state
        self.loader.seek(0)
        self.rollbacks = self.offset = 0
        state = create_state(self.config, self.tx, self.shardings)
        if self.config.init_from is None:
            return state
        source = Path(self.config.init_from)
        params, _ = load_params(source, latest_step(source), load_config(source))
        return dataclasses.replace(state, params=jax.tree.map(from_host, params, self.shardings.params))

    def batch(self) -> dict[str, jax.Array]:
        """The next global batch, on the mesh."""
        arrays = readable(lambda: next(self.loader))()
        return place(arrays, self.batch_sharding, self.rows, 1, self.config.microbatch_size)

    def position(self, step: int) -> dict[str, int]:
        """For the metrics of `step`: the rollbacks so far, and which step of the data it read."""
        if not self.rollbacks and not self.config.rollback.times:
            return {}
        return {"rollbacks": self.rollbacks, "data_step": step + self.offset}

    def evaluate(self, state: TrainState, watchdog: Watchdog) -> dict[str, DomainResult]:
        """Every domain's held-out text."""

        def begins(domain: str) -> None:
            watchdog.doing(f"evaluating {domain!r} after step {step}", compiling=not self._evaluated)
            self._evaluated = True

        step = int(state.step)
        return readable(lambda: self.evaluator(state, self.config.evaluate.max_bytes, begins))()

    def save(
        self, step: int, state: TrainState, bits_per_byte: float | None, skipped_in_row: int, *, must: bool
    ) -> None:
        """Saves, unless the run may go back and the last update was skipped: the newest should be from before that."""
        if skipped_in_row and self.config.rollback.times and not must:
            log.warning("step %d is not saved: its update was skipped, and the run may have to go back", step)
            return
        about = {ROLLBACKS: self.rollbacks, SKIPPED_IN_ROW: skipped_in_row}
        self.checkpoints.save(step, state, self.loader.get_state() | self.step.get_state() | about, bits_per_byte)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            if self.lock is not None:
                stack.callback(self.lock.close)
            stack.callback(self.loader.close)
            self.checkpoints.close()

    def _note_damage(self, step: int, reason: str) -> None:
        self.events.write(DAMAGED, step, reason=reason)

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
        for path, limit in exchanges.mesh_problems(model, self.mesh.shape):
            raise ConfigError(f"{path}: {limit}")
