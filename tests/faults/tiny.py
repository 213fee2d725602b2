"""The run that the fault campaign breaks: so small that a restart is what it costs, but all parts of a real one.

`MOE_FAULTS`, JSON in the environment, breaks numbers and input from within, where no signal reaches: see `Inner`. What
it breaks is broken in every process alike, except for a stalled reader.
"""

import dataclasses
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint._src.checkpointers import async_checkpointer

from moe.analysis import evaluation, report
from moe.balance import ExpertBiasConfig, LoadBalanceConfig
from moe.cluster.config import ClusterConfig
from moe.data import DataConfig, FolderConfig, TrainLoader
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.routing.topk import TopKConfig
from moe.train import step as train_step
from moe.train.run import CheckpointConfig, EvaluateConfig, RunConfig
from moe.train.steps import Steps

STEPS = 300
EVERY = 5
KEEP = 3
HEARTBEAT_S = 10
LAST_CHANCE = STEPS - 60
"""No fault is begun after this step: the run might be over before it strikes."""
_PACE_S = 0.01
"""Seconds a batch takes: else the run would be over before a fault can be aimed at it."""
_POISON = 1000
"""Added to the domain of every token of a poisoned batch; a router that does not read domains is blind to it."""


def get_config() -> RunConfig:
    _leave_out_the_final_report()
    _at_a_slow_pace()
    return _config()


def inner() -> RunConfig:
    """The same, with what `MOE_FAULTS` says; without it, the same program that is never poisoned."""
    config = get_config()
    Inner(**json.loads(os.environ.get("MOE_FAULTS", "{}"))).install()
    return config


def _config() -> RunConfig:
    return RunConfig(
        steps=STEPS,
        batch_size=4,
        model=DecoderConfig(
            vocab_size=258,
            width=16,
            num_layers=2,
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_width=8),
            moe=MoEConfig(num_experts=4, expert_hidden=16, router=TopKConfig(num_selected=2, normalise="sum")),
        ),
        balance=(LoadBalanceConfig(), ExpertBiasConfig()),
        data=DataConfig(
            source=FolderConfig(path="text"), seq_len=32, validation_fraction=0.2, prefetch=4, read_retries=1,
            read_backoff_s=0.2,
        ),
        optim=AdamWConfig(schedule=WarmupCosineConfig(warmup_steps=5)),
        cluster=ClusterConfig(
            heartbeat_timeout_s=HEARTBEAT_S, start_timeout_s=120, agree_timeout_s=120, verify_after=2
        ),
        checkpoint=CheckpointConfig(every=EVERY, keep_last=KEEP, keep_best=0),
        evaluate=EvaluateConfig(every=0, max_bytes=2048, final_max_bytes=2048),
    )  # fmt: skip


def _leave_out_the_final_report() -> None:
    """No fault is aimed at it, and it takes longer than all the steps."""
    evaluation.evaluate_run = lambda workdir: {}  # type: ignore[assignment]
    report.write_report = lambda workdir: Path(workdir)  # type: ignore[assignment]


def _at_a_slow_pace() -> None:
    real = TrainLoader.__next__

    def slow(self: TrainLoader) -> dict[str, Any]:
        time.sleep(_PACE_S)
        return real(self)

    TrainLoader.__next__ = slow  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """What is broken from within, or what a reference run does instead. Steps are counted from 1."""

    nan_data: tuple[int, ...] = ()
    """Steps of the data whose loss is not a number, whenever they are read."""
    nan_once: tuple[int, ...] = ()
    """The same, but only the first time: what a fault of the hardware does."""
    skip: tuple[int, ...] = ()
    """Reference: steps whose update is put back by hand, outside of the compiled step."""
    jump: tuple[int, int] = (0, 0)
    """Reference: before data step `jump[0]` the reader leaves out `jump[1]` steps of the data."""
    stall: tuple[int, int] = (-1, 0)
    """Process and step at which its reader hangs for ever, once a workdir."""
    refuse: tuple[int, int] = (-1, 0)
    """Process and step whose save its disk refuses, once a workdir."""
    happened: str = ""
    """A file that tells that it hung, or was refused."""

    def install(self) -> None:
        _poisonable()
        self._read()
        if self.skip:
            self._put_back()
        if self.happened:
            self._refuse()

    def _read(self) -> None:
        """The loader, with poison, a jump and a stall."""
        real, fired = TrainLoader.__next__, set()

        def broken(loader: TrainLoader) -> dict[str, Any]:
            begin, by = self.jump
            if by and loader.next_step == begin - 1:
                loader.seek(begin - 1 + by)
            number = loader.next_step + 1
            if tuple(self.stall) == (jax.process_index(), number) and not Path(self.happened).exists():
                Path(self.happened).touch()
                time.sleep(3600)
            batch = real(loader)
            if number in self.nan_data or (number in self.nan_once and number not in fired):
                fired.add(number)
                batch = batch | {"domains": batch["domains"] + _POISON}
            return batch

        TrainLoader.__next__ = broken  # type: ignore[method-assign]

    def _refuse(self) -> None:
        """What Orbax does behind the steps, where a disk is found full."""
        real = async_checkpointer._background_wait_for_commit_futures

        def refused(directory: Any, *rest: Any, **named: Any) -> None:
            here = (jax.process_index(), int(directory.name.split(".")[0]))
            if tuple(self.refuse) == here and not Path(self.happened).exists():
                Path(self.happened).touch()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(directory, *rest, **named)

        async_checkpointer._background_wait_for_commit_futures = refused

    def _put_back(self) -> None:
        real = Steps.__call__

        def call(steps: Steps, number: int, state: Any, arrays: Any) -> Any:
            if number not in self.skip:
                return real(steps, number, state, arrays)
            old = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(state)  # the step takes the buffers of `state`
            new, metrics = real(steps, number, state, arrays)
            kept = {name: getattr(old, name) for name in ("params", "opt_state", "balance", "idle_LE")}
            count = jax.jit(lambda x: x + 1)
            more = {name: count(getattr(old, name)) for name in ("skipped", "skipped_in_row")}
            return dataclasses.replace(new, **kept, **more), metrics

        Steps.__call__ = call  # type: ignore[method-assign]


def _poisonable() -> None:
    """A loss that is not a number where the batch is poisoned, in every process at once."""
    real = train_step.share_of_loss

    def share_of_loss(params: Any, model: Any, rules: Any, states: Any, carries: Any, arrays: Any, *rest: Any,
                      **named: Any) -> Any:  # fmt: skip
        poison = jnp.where((arrays["domains"] >= _POISON).any(), jnp.nan, 1.0)
        clean = arrays | {"domains": arrays["domains"] % _POISON}
        loss, left = real(params, model, rules, states, carries, clean, *rest, **named)
        return loss * poison, left

    train_step.share_of_loss = share_of_loss
