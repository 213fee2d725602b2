"""Product keys: experts on a grid, a score per coordinate, beam search over the grid, experts that may fail.

    g = x W_router, split into g_1 .. g_d of sizes M_1 .. M_d          (float32; D * sum(M) parameters, prod(M) experts)
    score(e) = sum_j g_j[u_j],          e = (u_1 .. u_d) in row-major order
    chosen = beam search: keep the K best prefixes per dimension, expand each by the next one
    w = softmax over the chosen of score

Scores are sums, so with every expert alive the beam is the exact top-K: no prefix outside the K best can lead to one of
the K best experts.

`failure_rate` emulates experts on machines that come and go: in training each (token, expert) fails with that
probability, before the choice. A prefix is kept only while some expert below it is alive, so no failed expert is ever
chosen, but the beam is not exact then: K prefixes with one survivor each may crowd out a prefix with better ones. A
token that finds fewer than K experts weights the ones it found, and the rest of its assignments are void; one that
finds none gets zero from the layer. Failed experts get no gradient from that token.

`probs` is the softmax over all survivors (uniform, without gradient, if there are none), `log_z` their logsumexp, and
counts are taken after the failures. `margin` is measured over all survivors, 0 where the beam missed a better one. The
expert bias is not used: with it scores are no longer sums and the beam would not find the best.

The scores of all E experts are written out (the balance rules need them), so what the grid saves is parameters and
D * E multiply-adds, not memory. Gradient: through `weight`, `probs` and `log_z`; the choice carries none. Collectives:
none.
Source: Ryabinin & Gusev 2020 (arXiv 2002.04013, section 3.1) and its released code (mryab/learning-at-home:
gating_function.py, faulty_dmoe_emulator.py).
Differs from the paper: experts fail per token instead of per sample; there are no timeouts and no stale gradients.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moe import param
from moe.config import at_least
from moe.kernels.highest import highest
from moe.routing import noise
from moe.routing.base import EXACT, SAVED_NAME, Context, Router, Routing, TokenChoiceConfig
from moe.routing.choice import token_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductKeyConfig(TokenChoiceConfig):
    """Experts on a grid, scored by coordinates."""

    uses_bias: ClassVar[bool] = False

    grid: tuple[int, ...] = (4, 2)
    """Sizes of the grid's dimensions; their product is num_experts."""
    failure_rate: float = 0.0
    """Probability that an expert fails a token in training."""
    init_std: float = 0.02
    """Standard deviation of the router's initial weights."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, init_std=0)
        if self.num_selected < 2:
            yield "num_selected", "must be at least 2: softmax over one expert is 1 and the router would never learn"
        if not self.grid or min(self.grid) < 2:
            yield "grid", "must have at least one dimension, each of at least 2"
        if not 0 <= self.failure_rate < 1:
            yield "failure_rate", "must be at least 0 and less than 1"

    def layer_problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        if math.prod(self.grid) != num_experts:
            yield "grid", f"its product is {math.prod(self.grid)} and must be num_experts = {num_experts}"
        if self.num_selected > num_experts:
            yield "num_selected", f"must be at most num_experts = {num_experts}"

    def build(self, key: jax.Array, width: int, num_experts: int) -> "ProductKey":
        return ProductKey(self, key, width)


class ProductKey(Router):
    """Parameter: w_router [D, sum(M)], the dimensions of the grid side by side."""

    def __init__(self, config: ProductKeyConfig, key: jax.Array, width: int):
        self.config = config
        self.w_router = param.normal(key, (width, sum(config.grid)), ("embed", None), config.init_std)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        config = self.config
        E = math.prod(config.grid)
        flat = jnp.einsum("bsd,dm->bsm", x_BSD.astype(jnp.float32), self.w_router[...], precision=EXACT)
        flat = checkpoint_name(flat, SAVED_NAME)
        parts = jnp.split(flat, np.cumsum(config.grid)[:-1].tolist(), axis=-1)
        scores_BSE = product_scores(parts)
        alive_BSE = jnp.ones(scores_BSE.shape, bool)
        if context.train and config.failure_rate:
            alive_BSE = checkpoint_name(noise.uniform(context, E) >= config.failure_rate, SAVED_NAME)

        expert_BSK, found_BSK = beam_search(parts, alive_BSE, config.num_selected)
        chosen_BSK = jnp.take_along_axis(scores_BSE, expert_BSK, axis=-1)
        log_z_BS, log_probs_BSE = _normalised(scores_BSE, alive_BSE)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=jnp.exp(_normalised(chosen_BSK, found_BSK)[1]),
            probs_BSE=jnp.exp(log_probs_BSE),
            log_z_BS=log_z_BS,
            margin_BS=_margin(scores_BSE, alive_BSE, expert_BSK, found_BSK),
            taken_BSK=found_BSK,
        )

    def symmetry(self, key: jax.Array, num_experts: int) -> tuple[jax.Array, "ProductKey"]:
        """Coordinates can be renamed inside each dimension of the grid, and nothing else."""
        orders, columns, start = [], [], 0
        for one, size in zip(jax.random.split(key, len(self.config.grid)), self.config.grid, strict=True):
            orders.append(jax.random.permutation(one, size))
            columns.append(start + orders[-1])
            start += size
        index = jnp.arange(num_experts).reshape(self.config.grid)[jnp.ix_(*orders)]
        renamed = {"w_router": self.w_router[...][:, jnp.concatenate(columns)]}
        return index.reshape(-1), param.bind(self, renamed)


def product_scores(parts: list[jax.Array]) -> jax.Array:
    """[B, S, prod(M)] the sum of every expert's coordinate scores [B, S, M_j]."""
    total_BSP = parts[0]
    for part_BSM in parts[1:]:
        total_BSP = (total_BSP[..., :, None] + part_BSM[..., None, :]).reshape(*total_BSP.shape[:2], -1)
    return total_BSP


def beam_search(parts: list[jax.Array], alive_BSE: jax.Array, num_selected: int) -> tuple[jax.Array, jax.Array]:
    """(int32 expert [B, S, K] by falling score, bool [B, S, K]: False where no living expert was found)."""
    B, S, E = alive_BSE.shape
    parts = [jax.lax.stop_gradient(part) for part in parts]
    prefix_BSk, score_BSk = jnp.zeros((B, S, 1), jnp.int32), jnp.zeros((B, S, 1))
    below = E
    for part_BSM in parts:
        M = part_BSM.shape[-1]
        below //= M
        some_alive_BSP = alive_BSE.reshape(B, S, -1, below).any(axis=-1)
        next_BSc = (prefix_BSk[..., None] * M + jnp.arange(M, dtype=jnp.int32)).reshape(B, S, -1)
        total_BSc = (score_BSk[..., None] + part_BSM[..., None, :]).reshape(B, S, -1)
        total_BSc = jnp.where(jnp.take_along_axis(some_alive_BSP, next_BSc, axis=-1), total_BSc, -jnp.inf)
        score_BSk, at_BSk = highest(total_BSc, min(num_selected, total_BSc.shape[-1]))
        prefix_BSk = jnp.take_along_axis(next_BSc, at_BSk, axis=-1)
    return checkpoint_name(prefix_BSk, SAVED_NAME), checkpoint_name(score_BSk > -jnp.inf, SAVED_NAME)


def _normalised(scores_BSN: jax.Array, alive_BSN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logsumexp [B, S], log softmax [B, S, N]) over the living; 0 and uniform, without gradient, if there are none."""
    none_BS1 = ~alive_BSN.any(axis=-1, keepdims=True)
    # Nothing of -inf reaches a gradient: where nobody lives, the scores are replaced by a constant.
    safe_BSN = jnp.where(none_BS1, 0.0, jnp.where(alive_BSN, scores_BSN, -jnp.inf))
    log_BSN = jax.nn.log_softmax(safe_BSN, axis=-1)
    log_z_BS = jnp.where(none_BS1[..., 0], 0.0, jax.nn.logsumexp(safe_BSN, axis=-1))
    return log_z_BS, log_BSN


def _margin(scores_BSE: jax.Array, alive_BSE: jax.Array, expert_BSK: jax.Array, found_BSK: jax.Array) -> jax.Array:
    """[B, S] the lowest score taken minus the best survivor left out, at least 0; +inf if none is left out."""
    scores_BSE = jax.lax.stop_gradient(scores_BSE)
    one_hot_BSKE = expert_BSK[..., None] == jnp.arange(scores_BSE.shape[-1])
    taken_BSE = (one_hot_BSKE & found_BSK[..., None]).any(axis=-2)
    lowest_BS = jnp.where(taken_BSE, scores_BSE, jnp.inf).min(axis=-1)
    left_BS = jnp.where(alive_BSE & ~taken_BSE, scores_BSE, -jnp.inf).max(axis=-1)
    return jnp.maximum(lowest_BS - left_BS, 0.0)
