"""Learning-rate schedules: optimizer step -> factor on the peak learning rate, from 0 to 1."""

import dataclasses
from collections.abc import Iterator

import optax

from moe.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Base of every schedule; its type selects the schedule."""

    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    final_fraction: float = 0.1
    """Learning rate at the end of the run as a fraction of the peak; the last step is one short of it."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, warmup_steps=0)
        if not 0 <= self.final_fraction <= 1:
            yield "final_fraction", "must be between 0 and 1"

    def run_problems(self, steps: int) -> Iterator[tuple[str, str]]:
        """Problems that show only once the length of the run is known."""
        if self.warmup_steps >= steps:
            yield "warmup_steps", f"must be less than steps = {steps}"

    def build(self, peak: float, steps: int) -> optax.Schedule:
        raise NotImplementedError(f"{type(self).__name__} must define build")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosineConfig(ScheduleConfig):
    """Linear warm-up, then half a cosine down to the final fraction."""

    def build(self, peak: float, steps: int) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            0.0 if self.warmup_steps else peak, peak, self.warmup_steps, steps, peak * self.final_fraction
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecayConfig(ScheduleConfig):
    """Linear warm-up, constant, then a linear decay over the last steps."""

    decay_steps: int = 100
    """Steps of the linear decay at the end."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from at_least(self, decay_steps=1)

    def run_problems(self, steps: int) -> Iterator[tuple[str, str]]:
        yield from super().run_problems(steps)
        if self.warmup_steps + self.decay_steps > steps:
            yield "decay_steps", f"must be at most steps - warmup_steps = {steps - self.warmup_steps}"

    def build(self, peak: float, steps: int) -> optax.Schedule:
        stable = steps - self.warmup_steps - self.decay_steps
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, self.warmup_steps),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, peak * self.final_fraction, self.decay_steps),
            ],
            [self.warmup_steps, self.warmup_steps + stable],
        )
