"""What shows only in each token's own choice of experts: which are chosen together, and which choices last.

With c_te = 1 if token t takes expert e, over T held-out tokens of one layer:

    pairs_ef = sum_t c_te c_tf                    tokens that take both experts; on the diagonal those of one expert
    kept     = sum_t |A_t and B_t| / sum_t |A_t|  A_t the experts of t, B_t those at another checkpoint
    jaccard  = mean_t |A_t and B_t| / |A_t or B_t|
    chance   = sum_e n_e m_e / (T sum_e n_e)      `kept` of two routers with these loads that look at no token

with n_e and m_e the tokens of expert e at the two checkpoints. `moe.analysis.specialisation.pair_lift` says what the
pairs mean. Padding takes no expert.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from moe.train.evaluate import Evaluator, Measured
from moe.train.loss import Arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike two checkpoints route the same tokens, per layer [L]; all 1 for a checkpoint and itself."""

    kept_L: NDArray[np.float64]
    jaccard_L: NDArray[np.float64]
    chance_L: NDArray[np.float64]


class ChoiceStudy:
    """A `Watch` that counts pairs of experts, and compares every choice with that of other parameters.

    `num_experts_L`: E of every layer. `other`: (parameters, bias, step) of another checkpoint of the same run, or None.
    `skipped` says why nothing could be counted, where that is so.
    """

    def __init__(self, evaluator: Evaluator, num_experts_L: NDArray[Any], other: tuple[Any, jax.Array, int] | None):
        self._evaluator, self._other = evaluator, other
        self._E_L = jnp.asarray(num_experts_L, jnp.int32)
        L, E = len(num_experts_L), int(max(num_experts_L, default=1))
        self.pairs_LEE = np.zeros((L, E, E), np.int64)
        self._alike_L4 = np.zeros((L, 4))
        self._count_LE, self._then_LE = np.zeros((L, E)), np.zeros((L, E))
        self._tokens_L = np.zeros(L, np.int64)
        self.skipped: str | None = None if L else "the model has no MoE layer"

    def __call__(self, measured: Measured, arrays: Arrays) -> None:
        if self.skipped is not None:
            return
        if measured.expert_LBR is None:
            self.skipped = "the layers do not all keep equally many assignments per sequence"
        elif measured.token_LBR is None:
            self.skipped = "the experts of some layer read mixtures of tokens, so no token has experts of its own"
        else:
            self._count(measured, arrays)

    def _count(self, now: Measured, arrays: Arrays) -> None:
        E, S = self.pairs_LEE.shape[-1], arrays["tokens"].shape[1] - 1
        self.pairs_LEE += np.asarray(count_pairs(now.expert_LBR, now.token_LBR, self._E_L, E, S)).astype(np.int64)
        self._tokens_L += np.asarray(now.tokens_L)
        if self._other is None:
            return
        params, bias_LE, step = self._other
        then = self._evaluator.measure(params, bias_LE, arrays, np.int32(step), now.first_sequence)
        choices = (now.expert_LBR, now.token_LBR, then.expert_LBR, then.token_LBR)
        self._alike_L4 += np.asarray(compare(choices, self._E_L, E, S))
        self._count_LE += np.asarray(now.count_LE)
        self._then_LE += np.asarray(then.count_LE)

    def agreement(self) -> Agreement | None:
        """What `other` and the evaluated parameters have in common; None without `other` or without choices."""
        if self._other is None or self.skipped is not None:
            return None
        both_L, now_L, jaccard_L, some_L = self._alike_L4.T
        chance_L = (self._count_LE * self._then_LE).sum(axis=1) / np.maximum(self._tokens_L * now_L, 1)
        return Agreement(
            kept_L=both_L / np.maximum(now_L, 1), jaccard_L=jaccard_L / np.maximum(some_L, 1), chance_L=chance_L
        )


def chosen(expert_BR: jax.Array, token_BR: jax.Array, num_experts: jax.Array, E: int, S: int) -> jax.Array:
    """float32 [B S, E]: 1 where the token takes the expert; assignments to `num_experts` or beyond are void."""
    B = expert_BR.shape[0]
    row_BR = token_BR + S * jnp.arange(B)[:, None]
    column_BR = jnp.where(expert_BR < num_experts, expert_BR, E)
    return jnp.zeros((B * S, E)).at[row_BR, column_BR].set(1.0, mode="drop")


@partial(jax.jit, static_argnums=(3, 4))
def count_pairs(expert_LBR: jax.Array, token_LBR: jax.Array, num_experts_L: jax.Array, E: int, S: int) -> jax.Array:
    """float32 [L, E, E] tokens that take both experts; exact below 2^24 tokens."""

    def layer(of: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        chosen_TE = chosen(*of, E, S)
        return jnp.einsum("te,tf->ef", chosen_TE, chosen_TE, precision="highest")

    return jax.lax.map(layer, (expert_LBR, token_LBR, num_experts_L))  # one layer's [T, E] at a time


@partial(jax.jit, static_argnums=(2, 3))
def compare(choices: Any, num_experts_L: jax.Array, E: int, S: int) -> jax.Array:
    """float32 [L, 4]: sums over tokens of |A and B|, |A|, |A and B| / |A or B|, and 1 where either has an expert."""

    def layer(of: tuple[Any, jax.Array]) -> jax.Array:
        (expert, token, other_expert, other_token), num_experts = of
        a_TE = chosen(expert, token, num_experts, E, S)
        b_TE = chosen(other_expert, other_token, num_experts, E, S)
        both_T, either_T = (a_TE * b_TE).sum(axis=1), jnp.maximum(a_TE, b_TE).sum(axis=1)
        jaccard_T = both_T / jnp.maximum(either_T, 1.0)
        return jnp.stack([both_T.sum(), a_TE.sum(), jaccard_T.sum(), (either_T > 0).sum()])

    return jax.lax.map(layer, (choices, num_experts_L))
