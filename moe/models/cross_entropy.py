"""Cross-entropy of hidden vectors against a vocabulary, with or without the logits of all tokens at once.

    logits_t = h_t W                    nll_t = log sum_v exp logits_tv - logits_t,target      nats, float32
    loss = sum of nll_t over real t     d loss / d logits_tv = softmax(logits_t)_v - [v = target_t]

`summed` works on chunks of tokens: a chunk's logits, loss and gradient are made together and the logits forgotten, so
[B, S, V] exists nowhere, and the products with W are three per token as with whole logits (forward, to h, to W): what
recomputing them in the backward pass would add does not arise. It may, because the loss is a plain sum: its gradient is
known up to a factor before the backward pass starts, which multiplies it. Chunks are taken of the tokens that a device
holds, so no chunk moves a token. The stages of a pipeline share the sequences, if their number divides a device's.

Gradient: to h and W. Second derivatives: none (a custom rule). Dtypes: products in the dtype of h with float32 results,
softmax and sums in float32, gradient of W in float32, of h in its dtype.
Collectives over a mesh, once each and not per chunk: all-gather of W over fsdp and context, of h over tensor;
reduce-scatter of their gradients over the same axes; all-reduce of the gradient of W over data and stages, of the loss
over all. Per chunk, over tensor: three numbers a token (the largest
logit, the sum, the target's logit).
Source: the softmax cut over the vocabulary is that of Shoeybi et al. 2019 (arXiv 1909.08053, section 3); gradient in
the forward pass: Hsu et al. 2024, Liger kernels (arXiv 2410.10989, section 3.2). Differs from the papers: both at once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe import axes

WIDTH_AXES = axes.FSDP + axes.CONTEXT
"""What cuts D of W."""


class Found(NamedTuple):
    loss: jax.Array
    d_hidden: jax.Array
    d_head: jax.Array


class _Cut(NamedTuple):
    """Mesh axes in use; all empty without a mesh."""

    copies: tuple[str, ...] = ()
    """What W is replicated over, with other tokens."""
    width: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def summed(
    hidden_BSD: jax.Array, head_DV: jax.Array, target_BS: jax.Array, real_BS: jax.Array, chunk: int
) -> jax.Array:
    """float32 scalar: nats summed over the tokens where `real_BS`; `chunk` tokens of a device at a time.

    `head_DV` is the float32 parameter. Over a mesh S must be divisible by context * tensor.
    """
    return _over_mesh(hidden_BSD, head_DV, target_BS, real_BS, chunk, gradient=False).loss


def _forward(
    hidden_BSD: jax.Array, head_DV: jax.Array, target_BS: jax.Array, real_BS: jax.Array, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    found = _over_mesh(hidden_BSD, head_DV, target_BS, real_BS, chunk, gradient=True)
    return found.loss, (found.d_hidden, found.d_head)


def _backward(chunk: int, kept: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[Any, ...]:
    return *((factor * part).astype(part.dtype) for part in kept), None, None


summed.defvjp(_forward, _backward)


def _over_mesh(
    hidden_BSD: jax.Array, head_DV: jax.Array, target_BS: jax.Array, real_BS: jax.Array, chunk: int, *, gradient: bool
) -> Found:
    local = functools.partial(_local, chunk=chunk, gradient=gradient)
    if not axes.mesh_in_use():
        return local(hidden_BSD, head_DV, target_BS, real_BS, cut=_Cut())
    shared = hidden_BSD.shape[0] % axes.size(jax.sharding.get_abstract_mesh(), (*axes.BATCH, axes.STAGE)) == 0
    stage = (axes.STAGE,) if shared else ()  # else every stage computes the whole loss
    batch = axes.BATCH + stage
    hidden, head = PartitionSpec(batch, axes.STREAM), axes.spec(("embed", "vocab"))
    tokens, scalar = PartitionSpec(batch, axes.CONTEXT), PartitionSpec()
    out: Any = (scalar, hidden, head) if gradient else (scalar, scalar, scalar)
    cut = _Cut(axes.DATA + stage, WIDTH_AXES, batch + axes.CONTEXT, axes.TENSOR)
    run: Any = jax.shard_map(
        functools.partial(local, cut=cut),
        in_specs=(hidden, head, tokens, tokens),
        out_specs=Found(*out),
        check_vma=True,
    )
    return run(hidden_BSD, head_DV, target_BS, real_BS)


def _local(
    hidden_BSD: jax.Array, head_DV: jax.Array, target_BS: jax.Array, real_BS: jax.Array,
    *, cut: _Cut, chunk: int, gradient: bool,
) -> Found:  # fmt: skip
    """One device's tokens and its slices of W and of the positions of h; everything it returns is reduced."""
    dtype = hidden_BSD.dtype
    head_DV = head_DV.astype(dtype)
    if cut.tokens:
        head_DV = jax.lax.all_gather(head_DV, cut.width, axis=0, tiled=True)
        hidden_BSD = jax.lax.all_gather(hidden_BSD, cut.vocab, axis=1, tiled=True)
    B, S, D = hidden_BSD.shape
    pieces = max(1, -(-B * S // chunk))
    size = -(-B * S // pieces)

    def pieced(x: jax.Array) -> jax.Array:
        x = x.reshape(B * S, *x.shape[2:])
        return jnp.pad(x, [(0, pieces * size - B * S)] + [(0, 0)] * (x.ndim - 1)).reshape(pieces, size, *x.shape[1:])

    def body(carry: tuple[jax.Array, jax.Array], one: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, d_head_DV = carry
        x_TD, target_T, real_T = one
        nll_T, d_logits_TV = _chunk(x_TD, head_DV, target_T, real_T, cut)
        total = total + nll_T.sum()
        if not gradient:
            return (total, d_head_DV), total
        d_TV = d_logits_TV.astype(dtype)
        d_x_TD = jnp.einsum("tv,dv->td", d_TV, head_DV, preferred_element_type=jnp.float32).astype(dtype)
        d_head_DV = d_head_DV + jnp.einsum("td,tv->dv", x_TD, d_TV, preferred_element_type=jnp.float32)
        return (total, d_head_DV), d_x_TD

    zero, zeros_DV = jnp.zeros(()), jnp.zeros(head_DV.shape if gradient else ())
    if cut.tokens:
        zero = jax.lax.pcast(zero, cut.tokens, to="varying")
        zeros_DV = jax.lax.pcast(zeros_DV, cut.tokens + cut.vocab, to="varying")
    (total, d_head_DV), d_x = jax.lax.scan(body, (zero, zeros_DV), tuple(map(pieced, (hidden_BSD, target_BS, real_BS))))
    loss = jax.lax.psum(total, cut.tokens)
    if not gradient:
        return Found(loss, loss, loss)
    d_hidden_BSD = d_x.reshape(pieces * size, D)[: B * S].reshape(B, S, D)
    if cut.tokens:
        d_hidden_BSD = jax.lax.psum_scatter(d_hidden_BSD, cut.vocab, scatter_dimension=1, tiled=True)
        d_head_DV = jax.lax.psum_scatter(d_head_DV, cut.width, scatter_dimension=0, tiled=True)
    return Found(loss, d_hidden_BSD, jax.lax.psum(d_head_DV, cut.copies))


def _chunk(
    x_TD: jax.Array, head_DV: jax.Array, target_T: jax.Array, real_T: jax.Array, cut: _Cut
) -> tuple[jax.Array, jax.Array]:
    """(nll [T], gradient of their sum by this device's logits [T, V]), both 0 where not real."""
    with jax.named_scope("logits"):
        logits_TV = jnp.einsum("td,dv->tv", x_TD, head_DV, preferred_element_type=jnp.float32)
    V = head_DV.shape[1]
    first = jax.lax.axis_index(cut.vocab) * V if cut.vocab else 0
    is_target_TV = jnp.arange(V) == (target_T - first)[:, None]
    largest_T1 = jax.lax.pmax(logits_TV.max(axis=1, keepdims=True), cut.vocab)
    exp_TV = jnp.exp(logits_TV - largest_T1)
    sums = exp_TV.sum(axis=1, keepdims=True), jnp.where(is_target_TV, logits_TV, 0.0).sum(axis=1, keepdims=True)
    sum_T1, chosen_T1 = jax.lax.psum(sums, cut.vocab)
    nll_T = jnp.where(real_T, (jnp.log(sum_T1) + largest_T1 - chosen_T1)[:, 0], 0.0)
    return nll_T, jnp.where(real_T[:, None], exp_TV / sum_T1 - is_target_TV, 0.0)
