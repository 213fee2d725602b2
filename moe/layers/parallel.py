"""Sublayers side by side: all read the same normed input, and their outputs are added.

    y = sum_i part_i(x)

With the residual around it, x + attention(N(x)) + experts(N(x)): the block of PaLM, GPT-J and BAM.
Statistics, expert bias and key are those of the one part that routes. Collectives: those of the parts.
Source: Zhang et al. 2024, BAM (arXiv 2408.08274, section 3) for attention beside experts; Chowdhery et al. 2022, PaLM
(arXiv 2204.02311, section 2). Differs from the papers: no difference known; BAM's attention experts are softly routed,
so they can stand beside feed-forward experts although at most one part may pick experts.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax

from moe.balance.statistics import Statistics
from moe.layers.base import Sublayer, SublayerConfig
from moe.routing.base import Context, RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(SublayerConfig):
    """Sublayers that read the same input and add their outputs."""

    label: ClassVar[str] = "parallel"

    parts: tuple[SublayerConfig, ...]
    """The sublayers; at most one of them routes."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(self.parts) < 2:
            yield "parts", "must hold at least two sublayers"
        if sum(part.routed_experts > 0 or part.active_share < 1 for part in self.parts) > 1:
            yield "parts", "must hold at most one sublayer that picks experts"

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        return any(part.mixes_tokens for part in self.parts)

    @property
    def output_scale(self) -> float:  # type: ignore[override]
        return math.hypot(*(part.output_scale for part in self.parts))

    def build(self, key: jax.Array, width: int, init_std: float, out_std: float) -> "Parallel":
        return Parallel(self, key, width, init_std, out_std)

    @property
    def routed_experts(self) -> int:
        return max(part.routed_experts for part in self.parts)

    @property
    def router(self) -> RouterConfig | None:
        """Of the part that picks experts, if there is one: it may be a router that decides for all layers."""
        return next((getattr(part, "router", None) for part in self.parts if part.routed_experts), None)

    @property
    def active_share(self) -> float:
        return min(part.active_share for part in self.parts)

    def divisible(self) -> Iterator[tuple[str, int, str]]:
        for index, part in enumerate(self.parts):
            for field, size, axis in part.divisible():
                yield f"parts.{index}.{field}", size, axis

    def multiply_adds(self, width: int, seq_len: int) -> float:
        return sum(part.multiply_adds(width, seq_len) for part in self.parts)


class Parallel(Sublayer):
    """x [B, S, D] -> y [B, S, D] in the dtype of x. A part's parameters lie under its label, the second of a kind
    under `label_1`."""

    def __init__(self, config: ParallelConfig, key: jax.Array, width: int, init_std: float, out_std: float):
        labels = [part.label for part in config.parts]
        repeats = [labels[:index].count(label) for index, label in enumerate(labels)]
        self.names = tuple(label + f"_{n}" * (n > 0) for label, n in zip(labels, repeats, strict=True))
        keys = jax.random.split(key, len(labels))
        for name, part, part_key in zip(self.names, config.parts, keys, strict=True):
            setattr(self, name, part.build(part_key, width, init_std, out_std))

    @property
    def parts(self) -> tuple[Sublayer, ...]:
        return tuple(getattr(self, name) for name in self.names)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        found = [part(x_BSD, context, bias_E) for part in self.parts]
        return sum(y for y, _ in found), next((sums for _, sums in found if sums is not None), None)  # type: ignore[return-value]

    def empty_cache(self, batch: int, length: int, dtype: Any) -> tuple[Any, ...]:
        return tuple(part.empty_cache(batch, length, dtype) for part in self.parts)

    def decode(
        self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        found = [part.decode(x_BSD, context, bias_E, one) for part, one in zip(self.parts, cache, strict=True)]
        return sum(y for y, _ in found), tuple(one for _, one in found)  # type: ignore[return-value]
