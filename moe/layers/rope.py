"""Rotary positions: pairs of dimensions of queries and keys are turned by an angle that grows with the position.

    angle_i = position * w_i,   w_i = theta^(-2i / W)           i = 0 .. W/2 - 1,  W the turned width
    (a, b) -> (a cos - b sin, b cos + a sin)

YaRN slows the frequencies that turn seldom in the `original_length` positions a model was trained on, to reach
`factor` times as many. With r_i = original_length w_i / (2 pi) turns and c(r) the (real) i at which there are r turns,

    w_i <- w_i ((1 - m_i) + m_i / factor),   m_i = clip((i - low) / (high - low), 0, 1)
    low = max(floor(c(fast)), 0),   high = min(ceil(c(slow)), W - 1)
    scores are multiplied by (0.1 mscale ln(factor) + 1)^2

Angles are float32, the result has the dtype of x. Collectives: none.
Source: Su et al. 2021 (arXiv 2104.09864), eq. 34; Peng et al. 2023, YaRN (arXiv 2309.00071), section 3; DeepSeek-V3's
released inference code for the rounding of low and high and the square in the scores. Differs from the papers: pairs
are i with i + W/2 unless `interleaved`; YaRN holds at every length, where DeepSeek's code omits it for short contexts.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moe.config import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Which dimensions turn, and which two make a pair."""

    width: int = 0
    """W, how many of a head's first dimensions turn, an even number; 0: all of them."""
    interleaved: bool = False
    """Pairs are neighbours 2i and 2i + 1 (DeepSeek) instead of i and i + W/2 (Llama)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, width=0)
        if self.width % 2:
            yield "width", "must be even"

    def head_problems(self, head_width: int) -> Iterator[tuple[str, str]]:
        """Problems that show only once the width of a head is known."""
        if self.width >= head_width:
            yield "width", f"must be less than the head's {head_width} dimensions; 0 turns them all"

    def theta_problems(self, theta: float) -> Iterator[str]:
        """What is wrong with the base of the frequencies, which the layer holds."""
        if not theta > 0:
            yield "must be greater than 0"

    def frequencies(self, width: int, theta: float) -> jax.Array:
        """float32 [width / 2] radians per position."""
        half = width // 2
        return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)

    @property
    def score_scale(self) -> float:
        """Factor on attention scores."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig(RopeConfig):
    """Rotary positions stretched to longer texts by YaRN."""

    factor: float = 40.0
    """How many times longer the texts become."""
    original_length: int = 4096
    """Positions the model was trained on before."""
    fast: float = 32.0
    """Frequencies with at least so many turns in the original length stay."""
    slow: float = 1.0
    """Frequencies with at most so many turns are divided by the factor."""
    mscale: float = 1.0
    """Scores are multiplied by (0.1 mscale ln(factor) + 1)^2; 0: by 1."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from at_least(self, original_length=1, mscale=0)
        if not self.factor > 1:
            yield "factor", "must be greater than 1; for 1 use RopeConfig"
        if not self.slow > 0:
            yield "slow", "must be greater than 0"
        if not self.fast > self.slow:
            yield "fast", f"must be greater than slow = {self.slow}"

    def theta_problems(self, theta: float) -> Iterator[str]:
        if not theta > 1:
            yield "must be greater than 1: YaRN needs frequencies that fall"

    def frequencies(self, width: int, theta: float) -> jax.Array:
        def where(turns: float) -> float:
            return width / 2 * math.log(self.original_length / (2 * math.pi * turns)) / math.log(theta)

        low, high = max(math.floor(where(self.fast)), 0), min(math.ceil(where(self.slow)), width - 1)
        slowed = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
        factor = (1 - slowed + slowed / self.factor).astype(np.float32)
        return super().frequencies(width, theta) * factor

    @property
    def score_scale(self) -> float:
        return (0.1 * self.mscale * math.log(self.factor) + 1) ** 2


def rotate(x_BSNH: jax.Array, position_BS: jax.Array, theta: float, rope: RopeConfig = RopeConfig()) -> jax.Array:
    """x with its first `rope.width` dimensions turned; the same shape and dtype."""
    width = rope.width or x_BSNH.shape[-1]
    angle = position_BS[..., None, None].astype(jnp.float32) * rope.frequencies(width, theta)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x32, rest = x_BSNH[..., :width].astype(jnp.float32), x_BSNH[..., width:]
    if rope.interleaved:
        a, b = x32[..., 0::2], x32[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x32.shape)
    else:
        a, b = jnp.split(x32, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x_BSNH.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
