"""RMSNorm: x / sqrt(mean(x^2) + eps) * scale, in float32, returned in the dtype of x.

Source: Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4. Differs from the paper: eps under the root.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe import param


class RMSNorm(nnx.Module):
    """x [..., width] -> the same shape and dtype; `scale` [width] starts at `gain`."""

    def __init__(self, width: int, eps: float = 1e-6, gain: float = 1.0):
        self.scale = param.declare(jnp.full((width,), gain, jnp.float32), ("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse * self.scale[...]).astype(x.dtype)
