"""Products of activations with weights that are stored in more pieces than they are used in (ZeRO-3).

The mesh cuts D of a dense parameter over fsdp and context for storage alone. A product needs it whole: the weight is
cast, gathered, used and forgotten, and gathered again for the gradient of the activations, so no more than a layer is
whole at a time. Its own gradient is made whole and cut again. Stated here because XLA, left alone, gathers activations
of the whole batch for the gradient of a weight whose output dimension is cut (seen in compiled programs, jax 0.10.2).
Source: Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), section 7.2. Differs from the paper: no difference known.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe.axes import constrain


def project(
    form: str, x: jax.Array, weight: jax.Array, axes: tuple[str | None, ...],
    x_axes: tuple[str | None, ...] | None = None, **einsum: Any,
) -> jax.Array:  # fmt: skip
    """`jnp.einsum(form, x, weight)` in the dtype of x, with the weight cut as the logical `axes` say and x as `x_axes`.

    Without `x_axes` x is taken as it is cut. It is kept for the gradient as it comes: a stream that is cut over tensor
    is gathered again, not kept whole.
    Gradient: x and weight. Collectives, forward and backward: an all-gather of the cast weight over the mesh axes that
    `axes` leaves out, and of x over those that `x_axes` leaves out; backward: the reduce-scatters of their gradients,
    of the weight's over the axes that cut tokens too.
    """

    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        x = x if x_axes is None else constrain(x, *x_axes)
        return jnp.einsum(form, x, constrain(weight.astype(x.dtype), *axes), **einsum)

    # Recomputing `run` is to cast and gather once more: the product is not needed for its gradients.
    return jax.checkpoint(run, prevent_cse=False)(x, weight)
