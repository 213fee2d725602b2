"""Activation on the logits: top-K of softmax(act(x W) + b) at a fixed, scheduled or learned temperature.

    z = act(x W_router) + b                            (float32)
    p = softmax(z / tau)
    chosen = top-K of  stop_gradient(p) + bias
    w = p_chosen | p_chosen / sum(p_chosen)
    tau = temperature.at(step)   or, learned,   softplus(r) with r a scalar parameter, tau = temperature.start at step 0

act = identity is the plain softmax router with a temperature. With identity and with relu (positively homogeneous),
(W, b, tau) -> (c W, c b, c tau) changes nothing: a learned tau is then not identifiable, and only a z-loss or weight
decay fixes the scale. silu, gelu, tanh and sigmoid break the symmetry, which is what the paper proposes them for.
tanh and sigmoid bound the logits: without b, max p <= e^(w / tau) / (e^(w / tau) + E - 1) with w = 2 or 1, so they want
a small tau.

`log_z` is the logsumexp of z / tau. Gradient: through `weight`, `probs` and `log_z`, to W, b and a learned tau; the
selection carries none. Collectives: none.
Source: Nguyen et al. 2024 (arXiv 2401.13875); b outside the activation is from memory, not verified.
Differs from the paper: it has no top-K (K = num_experts is its gate).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe import param
from moe.routing.base import EXACT, EXPERT_AXIS, SAVED_NAME, Context, LinearRouter, LinearRouterConfig, Routing
from moe.routing.choice import token_choice, top_k
from moe.routing.temperature import TemperatureConfig

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationGateConfig(LinearRouterConfig):
    """Top-k of softmax((act(x W) + b) / tau)."""

    activation: Literal["identity", "relu", "silu", "gelu", "tanh", "sigmoid"] = "silu"
    """act."""
    temperature: TemperatureConfig = TemperatureConfig(start=1.0, end=1.0)
    """tau by optimizer step; equal ends: a fixed number."""
    learned: bool = False
    """Learn tau from `temperature.start` on, instead of following a schedule."""
    normalise: Literal["none", "sum"] = "none"
    """Combine weights: the probabilities as they are, or divided by their sum over the K."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.num_selected == 1 and self.normalise != "none":
            yield "normalise", "must be 'none' when num_selected is 1: the weight would be 1 and the router never learn"
        if self.learned and self.temperature.start != self.temperature.end:
            yield "temperature.end", "a learned temperature ignores the schedule; make it equal to temperature.start"

    def build(self, key: jax.Array, width: int, num_experts: int) -> "ActivationGate":
        return ActivationGate(self, key, width, num_experts)

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        """`logits_BSE` are z / tau."""
        log_z_BS = jax.nn.logsumexp(logits_BSE, axis=-1)
        probs_BSE = jnp.exp(logits_BSE - log_z_BS[..., None])
        select_BSE = probs_BSE + bias_E
        expert_BSK, margin_BS = top_k(select_BSE, self.num_selected)
        chosen_BSK = jnp.take_along_axis(logits_BSE - log_z_BS[..., None], expert_BSK, axis=-1)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=jnp.exp(chosen_BSK) if self.normalise == "none" else jax.nn.softmax(chosen_BSK, axis=-1),
            probs_BSE=probs_BSE,
            log_z_BS=log_z_BS,
            margin_BS=margin_BS,
            select_BSE=select_BSE,
        )


class ActivationGate(LinearRouter):
    """Parameters: w_router [D, E], bias [E] from 0, and raw_temperature [] (r) where tau is learned."""

    config: ActivationGateConfig

    def __init__(self, config: ActivationGateConfig, key: jax.Array, width: int, num_experts: int):
        super().__init__(config, key, width, num_experts)
        self.bias = param.declare(jnp.zeros((num_experts,), jnp.float32), (EXPERT_AXIS,))
        if config.learned:
            start = config.temperature.start
            raw = jnp.float32(start + math.log(-math.expm1(-start)))  # softplus(raw) = start
            self.raw_temperature = param.declare(raw, ())

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        linear_BSE = jnp.einsum("bsd,de->bse", x_BSD.astype(jnp.float32), self.w_router[...], precision=EXACT)
        z_BSE = ACTIVATIONS[self.config.activation](linear_BSE) + self.bias[...]
        logits_BSE = checkpoint_name(z_BSE / self.temperature(context), SAVED_NAME)
        return self.config.route(logits_BSE, context, bias_E)

    def temperature(self, context: Context) -> jax.Array:
        """float32 tau."""
        if self.config.learned:
            return jax.nn.softplus(self.raw_temperature[...])
        return self.config.temperature.at(context.step)
