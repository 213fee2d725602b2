"""A decoder block: x + attention(norm(x)), then x + mlp-or-experts(norm(x))."""

import jax
from flax import nnx

from moe.axes import constrain
from moe.balance.statistics import Statistics
from moe.config import ConfigError
from moe.layers.attention import Attention, AttentionConfig, Cache
from moe.layers.mlp import MLP
from moe.layers.moe import MoE, MoEConfig
from moe.layers.norm import RMSNorm
from moe.models.layout import MOE
from moe.routing.base import Context


class Block(nnx.Module):
    def __init__(
        self,
        kind: str,
        key: jax.Array,
        *,
        width: int,
        mlp_hidden: int,
        attention: AttentionConfig,
        moe: MoEConfig | None,
        init_std: float,
        out_std: float,
    ):
        attention_key, mlp_key = jax.random.split(key)
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(attention, attention_key, width, init_std, out_std)
        self.mlp_norm = RMSNorm(width)
        if kind == MOE:
            assert moe is not None
            self.moe = MoE(moe, mlp_key, width, init_std, out_std)
            if not moe.router.causal:
                name = type(moe.router).__name__
                raise ConfigError(f"model.moe.router = {name}: routes a token by later ones, which a decoder must not")
        else:
            self.mlp = MLP(mlp_key, width, mlp_hidden, init_std, out_std)
        self.kind = kind

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        with jax.named_scope("attention"):
            x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), context.position_BS, context.segment_BS)
        return self._feed(x_BSD, context, bias_E)

    def decode(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        mixed, cache = self.attention.decode(self.attention_norm(x_BSD), context.position_BS, cache)
        x_BSD, _ = self._feed(x_BSD + mixed, context, bias_E)
        return x_BSD, cache

    def _feed(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> tuple[jax.Array, Statistics | None]:
        x_BSD = constrain(x_BSD, "batch", "position", None)
        if self.kind == MOE:
            with jax.named_scope("moe"):
                y_BSD, sums = self.moe(self.mlp_norm(x_BSD), context, bias_E)
            return constrain(x_BSD + y_BSD, "batch", "position", None), sums
        with jax.named_scope("mlp"):
            return constrain(x_BSD + self.mlp(self.mlp_norm(x_BSD)), "batch", "position", None), None
