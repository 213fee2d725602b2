"""Multi-token prediction: small modules behind the decoder that predict tokens further ahead while it trains.

    h0 = the decoder's last hidden vectors, before its final norm
    h^k_t = block_k( [norm(h^{k-1}_t) ; norm(embedding(x_{t+k}))] W_k )           k = 1 .. depth
    logits^k_t = final norm and output projection of the decoder, of h^k_t        predicts x_{t+k+1}
    loss = coefficient / depth * sum_k (1 / n) sum_t nll^k_t                      n: real targets of the batch

A position counts where token t + k + 1 belongs to the same document. The block is the last pattern of the model's
layout; its MoE layers come last in the statistics and in the expert bias. They see a few tokens less than the others
(not the last k of a document), but their balance terms are divided by all real tokens, so at perfect balance they are
1 - O(k / length of a document). Generation does not run the modules. They count as layers where initial weights are
scaled by depth, so the trunk starts a little smaller with them.

Gradient: into the trunk and the shared embedding and head. Collectives: none of its own.
Source: DeepSeek-V3 (arXiv 2412.19437, eq. 21-25). Differs from the paper: the model's last pattern may hold several
sublayers; the final norm is shared too.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from moe import param
from moe.config import at_least
from moe.layers.norm import RMSNorm
from moe.models.layout import Stacks
from moe.routing.base import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class AheadConfig:
    """Multi-token prediction."""

    depth: int = 1
    """How many tokens after the next one are predicted too, each by a block of its own."""
    coefficient: float = 0.3
    """Weight of their mean loss (DeepSeek-V3: 0.3, later 0.1)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, depth=1)
        if not self.coefficient > 0:
            yield "coefficient", "must be greater than 0"

    def stacks(self, trunk: Stacks) -> Stacks:
        """The blocks' layers: `depth` times the last pattern."""
        return (dataclasses.replace(trunk[-1], repeats=1),) * self.depth

    def multiply_adds(self, width: int, vocab_size: int) -> int:
        """Of one token, beside those of the blocks' layers."""
        return self.depth * (2 * width * width + width * vocab_size)


class Merge(nnx.Module):
    """hidden [B, S, D] and embeddings [B, S, D] -> [B, S, D]: both normalised, concatenated and projected."""

    def __init__(self, key: jax.Array, width: int, init_std: float, norm_eps: float = 1e-6):
        self.hidden_norm, self.token_norm = RMSNorm(width, norm_eps), RMSNorm(width, norm_eps)
        self.w_merge = param.normal(key, (2, width, width), (None, "embed", None), init_std)

    def __call__(self, hidden_BSD: jax.Array, token_BSD: jax.Array) -> jax.Array:
        both = jnp.stack([self.hidden_norm(hidden_BSD), self.token_norm(token_BSD)])
        return jnp.einsum("pbsd,pde->bse", both, self.w_merge[...].astype(both.dtype))


def ahead(context: Context, offset: int) -> Context:
    """The context of a block that reads the token `offset` positions on; padding where the document ends before."""
    segment_BS = context.segment_BS
    same_BS = _shift(segment_BS, offset) == segment_BS
    return dataclasses.replace(
        context, token_BS=_shift(context.token_BS, offset), segment_BS=jnp.where(same_BS, segment_BS, 0)
    )


def real_targets_ahead(segment_ids: jax.Array, offset: int) -> jax.Array:
    """bool [..., S]: the token offset + 1 positions on is real and belongs to the same document."""
    later = _shift(segment_ids, offset + 1)
    return ((later == segment_ids) & (later > 0))[..., :-1]


def targets_ahead(tokens: jax.Array, offset: int) -> jax.Array:
    """int32 [..., S]: the token offset + 1 positions on; 0 beyond the end."""
    return _shift(tokens, offset + 1)[..., :-1]


def _shift(values: jax.Array, by: int) -> jax.Array:
    """values[t + by] at t; 0 beyond the end."""
    return jnp.pad(values[..., by:], [(0, 0)] * (values.ndim - 1) + [(0, min(by, values.shape[-1]))])
