"""Load-balance loss with the load of a random sample: as many tokens as a group has, of the whole batch's mixture.

    f_g = load of n_g tokens drawn without replacement from the real tokens of the whole global batch
    loss = sum_g (n_g / n) E sum_i f_gi P_gi

The control that tells two effects of a wider scope apart: f_g is as noisy as that of a group of n sequences and, on
average, the load of the whole batch. All groups' samples together are one shuffle of the batch's tokens: each sample by
itself is a draw without replacement, and no two share a token. The draw depends on the run's key, step, layer, global
sequence index and position alone, so no cut of the batch changes it. Only tokens with an assignment are drawn: where a
router leaves tokens out, the last samples are smaller.

Needs every assignment of the batch: with A > 1 a pre-pass (one more forward), A sorts of T K numbers a layer, and
memory for them. Carries gradient through P alone. Collectives: XLA gathers the assignments of the batch for the sort.
Source: Qiu et al. 2025 (arXiv 2501.11873), the shuffled control of its ablation. Differs from the paper: the groups are
of sequences instead of ranks; that their samples are disjoint is ours.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe.balance.base import BalanceRule, Batch, State
from moe.balance.scope import group_problems, in_order
from moe.balance.statistics import Statistics, load
from moe.config import at_least

PURPOSE = 2**31 - 1  # folded into the run's key as steps are for the routers: no step is as large


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffledLoadBalanceConfig(BalanceRule):
    """E * sum_i f_i P_i with f of a random sample, 1 at perfect balance."""

    name: str = "shuffled"
    """Name in the log."""
    coefficient: float = 0.01
    """Weight in the loss, per layer."""
    sequences: int = 1
    """Size of a group: so many sequences' worth of tokens are drawn for it."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, coefficient=0, sequences=1)

    def batch_problems(self, num_microbatches: int, batch_size: int) -> Iterator[tuple[str, str]]:
        yield from group_problems("sequences", self.sequences, num_microbatches * batch_size)

    def asks(self) -> dict[str, Any]:
        return {"keep_choices": True}

    def needs_prepass(self, num_microbatches: int, batch_size: int) -> bool:
        return self.weighs and num_microbatches > 1

    def term(self, micro: Statistics, batch: Batch, carry: Any, state: State) -> tuple[jax.Array | None, Any, Any]:
        assert batch.key is not None
        key = jax.random.fold_in(jax.random.fold_in(batch.key, PURPOSE), batch.step)
        if batch.num_microbatches == 1:
            whole = jax.tree.map(lambda leaf: leaf[None], jax.lax.stop_gradient(micro))
        elif self.weighs:
            assert batch.statistics is not None
            whole = batch.statistics
        else:
            return None, carry, key
        B = micro.count_BE.shape[1]
        f_LBE = jax.lax.dynamic_slice_in_dim(self.sampled_load(whole, key), batch.microbatch * B, B, axis=1)
        value_L = micro.num_experts_L * (f_LBE * micro.prob_BE).sum(axis=(1, 2)) / batch.num_tokens
        return value_L, carry, key

    def report(self, records: Any, whole: Statistics) -> dict[str, jax.Array]:
        if self.weighs or whole.count_BE.shape[0] == 1:
            return {}
        f_LXE = self.sampled_load(whole, records[0])
        total = jnp.maximum(whole.tokens_B[:, 0].sum(), 1).astype(jnp.float32)
        value_L = whole.num_experts_L * (f_LXE * in_order(whole.prob_BE)).sum(axis=(1, 2)) / total
        return {f"balance/{self.name}": value_L}

    def sampled_load(self, whole: Statistics, key: jax.Array) -> jax.Array:
        """[L, X, E] for each sequence of the batch the load of its group's sample."""
        if whole.expert_BR is None or whole.token_BR is None:
            raise ValueError(f"balance rule {self.name!r} needs the assignments of single tokens in every layer")
        E, L = whole.count_BE.shape[-1], whole.count_BE.shape[1]
        keys_L = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(L))
        tokens_LX = in_order(whole.tokens_B[..., None])[..., 0]
        expert_LXR, token_LXR = in_order(whole.expert_BR), in_order(whole.token_BR)
        expert_LXR = jnp.where(expert_LXR < whole.num_experts_L[:, None, None], expert_LXR, E)
        tokens_LG = tokens_LX.reshape(L, -1, self.sequences).sum(axis=-1)
        count_LGE = jax.vmap(_sample, (0, 0, 0, 0, None))(keys_L, expert_LXR, token_LXR, tokens_LG, E)
        return jnp.repeat(load(count_LGE), self.sequences, axis=1)


def _sample(key: jax.Array, expert_XR: jax.Array, token_XR: jax.Array, tokens_G: jax.Array, E: int) -> jax.Array:
    """int32 [G, E] assignments of each group's sample in one layer; E in `expert_XR` is void."""
    X, R = expert_XR.shape
    of_row = jax.vmap(jax.random.fold_in, (None, 0))
    row_keys_X = of_row(key, jnp.arange(X))
    bits_XR = jax.vmap(lambda row, tokens: jax.vmap(jax.random.bits)(of_row(row, tokens)))(row_keys_X, token_XR)
    sequence_XR = jnp.broadcast_to(jnp.arange(X)[:, None], (X, R))
    # Tokens in random order, void assignments last; those of one token share their number and stay together.
    flat = [part.reshape(-1) for part in (token_XR, sequence_XR, bits_XR, expert_XR == E)]
    order = jnp.lexsort(flat)
    token, sequence, _, void = (part[order] for part in flat)
    expert = expert_XR.reshape(-1)[order]
    starts = jnp.concatenate([jnp.ones(1, bool), (token[1:] != token[:-1]) | (sequence[1:] != sequence[:-1])])
    rank = jnp.cumsum(starts) - 1
    group = jnp.where(void, len(tokens_G), jnp.searchsorted(jnp.cumsum(tokens_G), rank, side="right"))
    hit = jnp.cumsum(expert[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    seen = jnp.concatenate([jnp.zeros((1, E), jnp.int32), hit])
    return jnp.diff(seen[jnp.searchsorted(group, jnp.arange(len(tokens_G) + 1))], axis=0)
