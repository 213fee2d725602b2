"""Gated MLP (SwiGLU): y = (silu(x W_gate) * (x W_up)) W_down. Dense layers and shared experts.

Source: Shazeer 2020 (arXiv 2002.05202), eq. 6. Differs from the paper: no difference known.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe import param


class MLP(nnx.Module):
    """x [..., D] -> [..., D] in the dtype of x."""

    def __init__(self, key: jax.Array, width: int, hidden: int, init_std: float, out_std: float):
        gate, up, down = jax.random.split(key, 3)
        self.w_gate = param.normal(gate, (width, hidden), ("embed", "mlp"), init_std)
        self.w_up = param.normal(up, (width, hidden), ("embed", "mlp"), init_std)
        self.w_down = param.normal(down, (hidden, width), ("mlp", "embed"), out_std)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up, down = (w[...].astype(x.dtype) for w in (self.w_gate, self.w_up, self.w_down))
        return jnp.einsum("...f,fd->...d", jax.nn.silu(x @ gate) * (x @ up), down)
