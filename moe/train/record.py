"""From a step's metrics on the device to a line on disk and on the screen; and the trace of chosen steps."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moe.plan.flops import peak_flops, train_flops_per_token
from moe.train.failures import NotFinite
from moe.train.metrics import MetricWriter
from moe.train.progress import Progress
from moe.train.run import RunConfig


class Pending(NamedTuple):
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict[str, jax.Array]
    waited: float
    """Seconds the loop waited for its batch."""


class Recorder:
    """Reads metrics from the device, adds the rates, writes them down; without writer and progress only reads."""

    def __init__(self, config: RunConfig, writer: MetricWriter | None, progress: Progress | None):
        self._config, self._writer, self._progress = config, writer, progress
        self._flops = train_flops_per_token(config.model, config.data.seq_len)
        self._tokens = config.batch_size * config.data.seq_len
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * jax.device_count() if peak is not None else None
        self._last = time.perf_counter()

    def read(self, pending: Pending) -> dict[str, Any]:
        """Waits for the step's metrics; the step took from the last `read` or `restart` until now."""
        values = {name: value.tolist() for name, value in jax.device_get(pending.metrics).items()}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        values |= {
            "step": pending.step,
            "tokens": pending.step * self._tokens,  # positions, padding included; real ones: load/tokens
            "time/step_s": seconds,
            "time/data_wait_s": pending.waited,
            "time/tokens_per_s": self._tokens / seconds,
            "time/flops_per_s": self._tokens * self._flops / seconds,
        }
        if self._peak is not None:
            values["time/mfu"] = values["time/flops_per_s"] / self._peak
        return values

    def write(self, values: dict[str, Any]) -> None:
        """Writes and shows a step's values; raises NotFinite once too many updates in a row were skipped."""
        step = values["step"]
        if self._writer is not None:
            self._writer.write(step, {name: value for name, value in values.items() if name != "step"})
        if self._progress is not None:
            self._progress.update(step, values)
        if values["skipped_in_row"] >= self._config.max_skipped:
            raise NotFinite(
                f"step {step}: loss or gradient was not finite in {values['skipped_in_row']} updates in a row"
                f" (max_skipped = {self._config.max_skipped}); loss {values['loss']}, gradient norm"
                f" {values['grad_norm']}, learning rate {values['learning_rate']}; the parameters are those of the last"
                " good step",
                step,
            )

    def note(self, what: str) -> None:
        """Says something between two steps."""
        if self._progress is not None:
            self._progress.note(what)

    def restart(self) -> None:
        """Leaves out of the next step's time what was done since the last `read` (evaluating, saving)."""
        self._last = time.perf_counter()


def describe_balance(config: RunConfig) -> dict[str, str]:
    """What each balance rule of a run does, by its name; for a load over the whole batch, how it is come by."""
    found = {}
    for rule in config.balance:
        parts = [type(rule).__name__]
        if rule.coefficient:
            parts.append(f"coefficient {rule.coefficient:g}")
        parts += [f"{name} {getattr(rule, name)}" for name in ("scope", "accumulation") if hasattr(rule, name)]
        if rule.needs_prepass(config.accumulation, config.microbatch_size):
            parts.append("a pass without gradient over the whole batch comes before every update")
        elif hasattr(rule, "accumulation"):
            parts.append("no extra pass")
        found[rule.name] = ", ".join(parts)
    return found


class Trace:
    """A profiler trace of the steps from first to last; of what is left of them if the run is resumed among them."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._running = steps, folder, False

    def before(self, step: int) -> None:
        if self._steps is not None and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: jax.Array) -> None:
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that still runs."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
