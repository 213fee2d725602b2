"""Softmax temperature as a function of the optimizer step.

    exp:     tau(t) = start * (end / start) ** (t / decay_steps)
    linear:  tau(t) = start + (end - start) * t / decay_steps          both stay at `end` from t = decay_steps on

float32 scalar, no gradient; both ends are exact. With start = end the temperature is a constant.
Source: the released code of EvoMoE (codecaution/EvoMoE, fairseq_cli/train.py). Differs from it: `end` is reached
exactly, not within rounding.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from moe.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemperatureConfig:
    """A temperature that falls from `start` to `end`."""

    start: float = 2.0
    """Temperature at step 0."""
    end: float = 0.3
    """Temperature from `decay_steps` on; equal to `start`: a constant."""
    decay_steps: int = 10_000
    """Optimizer steps of the fall."""
    shape: Literal["exp", "linear"] = "exp"
    """A constant factor, or a constant amount, per step."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.end > 0:
            yield "end", "must be greater than 0"
        if not self.start >= self.end:
            yield "start", f"must be at least end = {self.end}: the temperature never rises"
        yield from at_least(self, decay_steps=1)
        for field in ("decay_steps", "shape") if self.start == self.end else ():
            if getattr(self, field) != getattr(TemperatureConfig, field):
                yield field, f"is ignored, as start = end = {self.end}: the temperature is a constant"

    def at(self, step: jax.Array) -> jax.Array:
        """float32 tau at an int32 step."""
        if self.start == self.end:
            return jnp.float32(self.end)
        done = jnp.clip(step.astype(jnp.float32) / self.decay_steps, 0.0, 1.0)
        if self.shape == "exp":
            tau = self.start * jnp.exp(math.log(self.end / self.start) * done)
        else:
            tau = self.start + (self.end - self.start) * done
        return jnp.where(done < 1.0, jnp.maximum(tau, self.end), self.end)
