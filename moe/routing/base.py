"""The routing contract: a router turns tokens into a static list of assignments, and never sees an expert.

Everything is kept per sequence. A sequence is the unit no cut of the batch divides, so statistics that are sums over
sequences can be pooled over any scope afterwards, and the arrays are sharded like the batch.

A new router is one class. Where logits are linear in the token, subclass `LinearRouterConfig` (`LinearScoresConfig` if
there is no K) and define `route`; where they are not, subclass `RouterConfig` and let `build` return a `Router` of your
own.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe import param
from moe.config import at_least

SAVED_NAME = "router"
"""Checkpoint name of router outputs: every remat policy keeps them, so a recomputed layer cannot pick other experts."""

EXACT = jax.lax.Precision.HIGHEST
"""Precision of products that choose experts: by default accelerators round float32 operands to TF32 or bfloat16."""

EXPERT_AXIS = "router_experts"
"""Logical axis of a parameter's dimension that counts experts."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a router may ask about its tokens, beside their hidden vectors."""

    token_BS: jax.Array
    """int32 token ids."""
    segment_BS: jax.Array
    """int32 document number inside the packed sequence, from 1; 0 is padding."""
    position_BS: jax.Array
    """int32 position inside the document."""
    task_BS: jax.Array
    """int32 task of the token: the index of its domain in the corpus's sorted domains; 0 where nothing is known."""
    sequence_B: jax.Array
    """int32 index of the sequence in the global batch: noise keys fold it, so no cut of the batch changes them."""
    step: jax.Array
    """int32 optimizer step."""
    key: jax.Array
    """Random key of this layer and step."""
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    routing: "Routing | None" = None
    """Of a router that decides once for all layers; None where every layer has a router of its own."""
    keep_choices: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether the layers' statistics hold every single assignment, beside the sums."""
    shortfall: tuple[float, int] | None = dataclasses.field(default=None, metadata={"static": True})
    """(reach, bins) of the histogram of missing scores that the layers' statistics hold; see `quantile`."""

    @property
    def mask_BS(self) -> jax.Array:
        """True where the token is real."""
        return self.segment_BS > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """For routers that assign mixtures of tokens: P slots a sequence take the tokens' place before dispatch."""

    gather_BPS: jax.Array
    """float32; slot p reads sum_s gather[p, s] x_s."""
    scatter_BSP: jax.Array
    """float32; token s receives sum_p scatter[s, p] y_p."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """R assignments per sequence (static), and what the balance rules need. All floats are float32."""

    token_BR: jax.Array
    """int32 position in its sequence of the token that is assigned; a slot, where there are `slots`."""
    expert_BR: jax.Array
    """int32 expert in [0, E); E marks a void assignment (a padding token): it reaches no expert and no count."""
    weight_BR: jax.Array
    """Combine weight, 0 where void. Carries gradient."""
    probs_BSE: jax.Array
    """Scores normalised to sum to 1 over experts, 0 for padding. Carries gradient."""
    log_z_BS: jax.Array
    """logsumexp of the router logits, 0 for padding. Carries gradient."""
    margin_BS: jax.Array
    """Selection score of the last expert taken minus the first one left out; +inf for padding. No gradient."""
    priority_BR: jax.Array | None = None
    """Who stays when a buffer overflows: the highest first. None: the router has no opinion. No gradient."""
    select_BSE: jax.Array | None = None
    """Selection scores, bias included, whose best are taken; None: the router does not select so. No gradient."""
    slots: Slots | None = None
    """Set by routers that assign mixtures of tokens."""
    num_selected: int | None = dataclasses.field(default=None, metadata={"static": True})
    """K if every token has exactly K assignments and token_BR is [0]*K + [1]*K + ..., else None."""

    @property
    def num_experts(self) -> int:
        return self.probs_BSE.shape[-1]


class Router(nnx.Module):
    """Scores tokens and picks experts. Pure: state goes in, a `Routing` comes out, nothing is written."""

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def empty_cache(self, batch: int, length: int) -> Any:
        """What `decode` remembers of the positions so far; () if the router looks at one token at a time."""
        return ()

    def decode(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array, cache: Any) -> tuple[Routing, Any]:
        """The same for S new positions that follow the cached ones."""
        return self(x_BSD, context, bias_E), cache

    def symmetry(self, key: jax.Array, num_experts: int) -> tuple[jax.Array, "Router"] | None:
        """A random renaming under which the router is equivariant: (order_E, the router whose expert i is order[i]).

        It permutes every parameter dimension that counts experts by `permutation`; None declares that there is none.
        """
        if (order_E := self.permutation(key, num_experts)) is None:
            return None
        axes = param.logical_axes(self)
        is_axes = lambda part: isinstance(part, tuple)  # noqa: E731

        def rename(names: tuple[str | None, ...], value: jax.Array) -> jax.Array:
            for dimension, name in enumerate(names):
                value = jnp.take(value, order_E, axis=dimension) if name == EXPERT_AXIS else value
            return value

        return order_E, param.bind(self, jax.tree.map(rename, axes, param.pure(self), is_leaf=is_axes))

    def permutation(self, key: jax.Array, num_experts: int) -> jax.Array | None:
        """A random order int32 [E] of the experts for `symmetry`: any, unless a router with less symmetry overrides."""
        return jax.random.permutation(key, num_experts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of every router's config; its type selects the router."""

    causal: ClassVar[bool] = True
    """Whether a token's routing depends on no later token; a causal decoder refuses a router that says False."""
    padding_invariant: ClassVar[bool] = True
    """Whether padding appended to a sequence leaves its routing as it was."""
    task_gradient: ClassVar[bool] = True
    """Whether the task's loss alone teaches every parameter of the router; where not, the docstring says why."""
    uses_bias: ClassVar[bool] = True
    """Whether the expert bias moves the selection; a bias rule beside a router that says False would do nothing."""
    all_layers: ClassVar[bool] = False
    """Whether one router decides once and every MoE layer of the model follows it."""

    def build(self, key: jax.Array, width: int, num_experts: int) -> Router:
        raise NotImplementedError(f"{type(self).__name__} must define build")

    def experts_per_token(self, num_experts: int) -> float:
        """Assignments per token on average, for counting parameters and FLOPs."""
        raise NotImplementedError(f"{type(self).__name__} must define experts_per_token")

    def expert_runs_per_token(self, num_experts: int, seq_len: int) -> float:
        """Runs of an expert per token: its assignments, unless experts run on something else than tokens."""
        return self.experts_per_token(num_experts)

    @property
    def gives_priority(self) -> bool:
        """Whether its `Routing` says who stays when an expert's buffer overflows."""
        return False

    @property
    def gives_scores(self) -> bool:
        """Whether its `Routing` holds the selection scores, which quantile balancing reads."""
        return self.uses_bias

    def layer_problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        """Problems that show only once the number of experts is known."""
        yield from ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenChoiceConfig(RouterConfig):
    """Base of routers of which every token takes K experts."""

    num_selected: int = 2
    """K, experts per token."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, num_selected=1)

    def layer_problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        if self.num_selected > num_experts:
            yield "num_selected", f"must be at most num_experts = {num_experts}"

    def experts_per_token(self, num_experts: int) -> float:
        return self.num_selected


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScoresConfig(RouterConfig):
    """Base of routers whose logits are linear in the token: z = x W_router. Subclasses define `route`."""

    init_std: float = 0.02
    """Standard deviation of the router's initial weights."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, init_std=0)

    def build(self, key: jax.Array, width: int, num_experts: int) -> "LinearRouter":
        return LinearRouter(self, key, width, num_experts)

    def initial(self, key: jax.Array, width: int, num_experts: int) -> jax.Array:
        """W_router [D, E] at step 0."""
        return self.init_std * jax.random.truncated_normal(key, -3.0, 3.0, (width, num_experts), jnp.float32)

    def inputs(self, x_BSD: jax.Array, context: Context) -> jax.Array:
        """What is scored, from float32 tokens; jitter goes here."""
        return x_BSD

    def permutation(self, key: jax.Array, num_experts: int) -> jax.Array | None:
        """See `Router.permutation`."""
        return jax.random.permutation(key, num_experts)

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        """float32 logits -> Routing."""
        raise NotImplementedError(f"{type(self).__name__} must define route")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRouterConfig(LinearScoresConfig, TokenChoiceConfig):
    """Base of routers with linear logits of which every token takes K experts. Subclasses define `route`."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from LinearScoresConfig.problems(self)
        yield from TokenChoiceConfig.problems(self)


class LinearRouter(Router):
    """x [B, S, D] any float dtype -> logits float32 [B, S, E] -> what its config makes of them."""

    def __init__(self, config: LinearScoresConfig, key: jax.Array, width: int, num_experts: int):
        self.config = config
        self.w_router = param.declare(config.initial(key, width, num_experts), ("embed", EXPERT_AXIS))

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        x_BSD = self.config.inputs(x_BSD.astype(jnp.float32), context)
        logits_BSE = jnp.einsum("bsd,de->bse", x_BSD, self.w_router[...], precision=EXACT)
        logits_BSE = checkpoint_name(logits_BSE, SAVED_NAME)
        return self.config.route(logits_BSE, context, bias_E)

    def permutation(self, key: jax.Array, num_experts: int) -> jax.Array | None:
        return self.config.permutation(key, num_experts)
