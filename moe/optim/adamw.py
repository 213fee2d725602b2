"""AdamW with global-norm clipping, a decay mask, and learning rates by parameter path.

    g <- g * min(1, clip_norm / |g|);  m, v <- Adam moments of g
    w <- w - lr_t * scale(path) * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)

Weight decay acts on parameters with at least two logical dimensions (not on norms). `scale(path)` is the factor of the
last pattern in `lr_scale` found in the path; 0 freezes: the parameter does not move and its gradient does not count in
the norm. Moments are float32.

Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2. Differs from the paper: the decay is scaled by the
learning rate, as in every current implementation.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import Any

import jax
import optax

from moe.config import ConfigError, at_least
from moe.optim import tiled
from moe.optim.schedule import ScheduleConfig, WarmupCosineConfig
from moe.optim.tiled import Clip, Tiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW."""

    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: ScheduleConfig = WarmupCosineConfig()
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices, in units of the learning rate."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    lr_scale: tuple[tuple[str, float], ...] = ()
    """Pairs of a pattern searched in the parameter path and a factor on its learning rate; 0 freezes."""
    tile: int = 0
    """Update so many elements of a device's slice of a parameter at a time, 0: all. Changes memory, not numbers."""
    offload: bool = False
    """Keep the moments in the host's memory and bring them to the device tile by tile."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for field in ("learning_rate", "eps", "clip_norm"):
            if not getattr(self, field) > 0:
                yield field, "must be greater than 0"
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                yield field, "must be at least 0 and less than 1"
        yield from at_least(self, weight_decay=0, tile=0)
        if self.offload and not self.tile:
            yield "tile", "must be at least 1 with offload, say 1000000: whole parameters would fill the device again"
        for pattern, scale in self.lr_scale:
            if scale < 0:
                yield "lr_scale", f"the factor of {pattern!r} must be at least 0"
            try:
                re.compile(pattern)
            except re.error as error:
                yield "lr_scale", f"{pattern!r} is not a regular expression: {error}"

    def build(self, params: Any, decay: Any, steps: int) -> optax.GradientTransformation:
        """The transformation for `params` (may be abstract); `decay` is a tree of bools: which of them decay."""
        scales = path_scales(params, self.lr_scale)
        return optax.chain(
            optax.stateless(lambda grads, _: _frozen(grads, scales)),
            optax.clip_by_global_norm(self.clip_norm),
            *self._each(decay, scales, steps),
        )

    def _each(self, decay: Any, scales: Any, steps: int) -> tuple[optax.GradientTransformation, ...]:
        """What works element by element."""
        return (
            optax.scale_by_adam(self.beta1, self.beta2, self.eps),
            optax.add_decayed_weights(self.weight_decay, decay),
            optax.scale_by_learning_rate(self.schedule.build(self.learning_rate, steps)),
            optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scales)),
        )

    @property
    def in_tiles(self) -> bool:
        """Whether `update_tiles` does the update."""
        return self.tile > 0 or self.offload

    def update_tiles(
        self, grads: Any, state: Any, params: Any, keep: jax.Array, *, decay: Any, steps: int, specs: Any
    ) -> tuple[Any, Any]:
        """(parameters, state) after the update that `build` makes; as they were where `keep` is False.

        `specs`: the parameters' PartitionSpecs. See `moe.optim.tiled`.
        """
        scales = path_scales(params, self.lr_scale)
        each = jax.tree.map(lambda decays, scale: optax.chain(*self._each(decays, scale, steps)), decay, scales)
        grads = _frozen(grads, scales)
        clip = Clip(optax.tree.norm(grads), self.clip_norm)
        first, rest = state[:2], state[2:]
        params, rest = tiled.update(each, clip, grads, rest, params, keep, specs, Tiling(self.tile, self.offload))
        return params, (*first, *rest)


def _frozen(grads: Any, scales: Any) -> Any:
    """Zeros where the learning rate is multiplied by 0."""
    return jax.tree.map(lambda g, s: g if s else jax.numpy.zeros_like(g), grads, scales)


def path_scales(params: Any, lr_scale: tuple[tuple[str, float], ...]) -> Any:
    """The learning-rate factor of every parameter; ConfigError for a pattern that is found in no path."""
    paths = parameter_paths(params)
    names = jax.tree.leaves(paths)
    for pattern, _ in lr_scale:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ConfigError(
                f"optim.lr_scale = {pattern!r}: found in no parameter path; the nearest are {', '.join(near)}"
            )

    def scale(name: str) -> float:
        return next((factor for pattern, factor in reversed(lr_scale) if re.search(pattern, name)), 1.0)

    return jax.tree.map(scale, paths)


def parameter_paths(params: Any) -> Any:
    """The tree of `params` with every leaf replaced by its dotted path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: ".".join(str(getattr(key, "key", key)) for key in path), params
    )
