"""One sublayer and its place on the residual stream: where its norms stand.

    pre:       x + f(N(x))
    post:      N(x + f(x))
    sandwich:  x + N_post(f(N(x))),  the gain of N_post starts at c / sqrt(L)
    hybrid:    x + f(x) where f mixes tokens (its heads are normalised instead),  N(x) + f(N(x)) elsewhere
    hybrid_star: as hybrid, but in the first block pre

L is half the number of sublayers: layers, where each has attention and one feed-forward. c is the standard deviation
of the sublayer's output: 0.283 for attention, 0.432 for MLPs and experts, so that the stream's root mean square stays
of order 1 at any depth; with gain 1 it would grow as sqrt(2 L).

A norm right behind experts divides out whatever factor a token's whole output has. With one expert a token and no
shared expert that factor is the router's weight, and the task would not teach the router: `DecoderConfig` refuses it.

Norms are float32 and have a gain each. The stream is cut over positions by context and tensor, so that norms and sums
run on a token once; sublayers that cut heads or hidden units over tensor gather what they read and scatter what they
write. Collectives: none.
Source: Yin et al. 2025, Pangu Ultra (arXiv 2504.07866, section 2) for sandwich, its c and its gains; Zhuo et al. 2025,
HybridNorm (arXiv 2503.04598) and https://github.com/BryceZhuo/HybridNorm for hybrid; Xiong et al. 2020 (arXiv
2002.04745) for pre and post. Differs from the papers: a final norm follows in all of them; Pangu Ultra's initial
standard deviations (TinyInit) are not here.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
from flax import nnx

from moe.axes import constrain
from moe.balance.statistics import Statistics
from moe.layers.base import Sublayer, SublayerConfig
from moe.layers.norm import RMSNorm
from moe.routing.base import Context

Norm = Literal["pre", "post", "sandwich", "hybrid", "hybrid_star"]
Form = Literal["pre", "post", "sandwich", "bare", "normed"]
"""What one sublayer does: the first three as above, x + f(x), or N(x) + f(N(x))."""


def form_of(norm: Norm, config: SublayerConfig, in_first_block: bool) -> Form:
    """The form of a sublayer under a model's norm placement."""
    if norm == "hybrid_star" and in_first_block:
        return "pre"
    if norm in ("hybrid", "hybrid_star"):
        return "bare" if config.mixes_tokens else "normed"
    return norm  # type: ignore[return-value]  # of the others each is its own form


def norm_problems(norm: Norm, sublayers: list[tuple[str, SublayerConfig]]) -> Iterator[tuple[str, str]]:
    """Sublayers that a model with these norms cannot hold; `sublayers` as in `DecoderConfig.sublayers`."""
    for prefix, config in sublayers:
        if norm.startswith("hybrid") and config.mixes_tokens and getattr(config, "head_norm", "") != "qkv":
            fields = {field.name for field in dataclasses.fields(config)}
            inner = {"head_norm": "head_norm", "attention": "attention.head_norm"}
            field = next((prefix + path for name, path in inner.items() if name in fields), prefix[:-1])
            yield field, f"must have head_norm='qkv', as norm={norm!r} does not normalise its input"
        if norm == "sandwich" and config.router_only_scales:
            yield (
                "norm",
                f"would divide out the only weight of model.{prefix[:-1]}, one expert a token and none shared: the"
                " task could not teach the router; use two experts a token, a shared expert or another norm",
            )


class Residual(nnx.Module):
    """x [B, S, D] -> x after the sublayer, and its statistics."""

    def __init__(
        self, config: SublayerConfig, form: Form, key: jax.Array, *, width: int, depth: float, init_std: float,
        norm_eps: float = 1e-6,
    ):  # fmt: skip
        self.form, self.label = form, config.label
        if form != "bare":
            self.norm = RMSNorm(width, norm_eps)
        setattr(self, self.label, config.build(key, width, init_std, init_std / math.sqrt(2 * depth)))
        if form == "sandwich":
            self.post_norm = RMSNorm(width, norm_eps, gain=config.output_scale / math.sqrt(depth))

    @property
    def sublayer(self) -> Sublayer:
        return getattr(self, self.label)

    def read(self, x_BSD: jax.Array) -> jax.Array:
        """What the sublayer sees of the stream."""
        return x_BSD if self.form in ("bare", "post") else constrain(self.norm(x_BSD), "batch", "stream", None)

    def write(self, x_BSD: jax.Array, read_BSD: jax.Array, y_BSD: jax.Array) -> jax.Array:
        """The stream after the sublayer has made y of what it read."""
        if self.form == "sandwich":
            y_BSD = self.post_norm(constrain(y_BSD, "batch", "stream", None))
        x_BSD = constrain((read_BSD if self.form == "normed" else x_BSD) + y_BSD, "batch", "stream", None)
        x_BSD = self.norm(x_BSD) if self.form == "post" else x_BSD
        return constrain(x_BSD, "batch", "stream", None)

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        with jax.named_scope(self.label):
            read_BSD = self.read(x_BSD)
            y_BSD, sums = self.sublayer(read_BSD, context, bias_E)
            return self.write(x_BSD, read_BSD, y_BSD), sums

    def decode(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        with jax.named_scope(self.label):
            read_BSD = self.read(x_BSD)
            y_BSD, cache = self.sublayer.decode(read_BSD, context, bias_E, cache)
            return self.write(x_BSD, read_BSD, y_BSD), cache
