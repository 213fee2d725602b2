"""One global batch under many cuts: the measuring half of the invariance tests.

`measure` gives, for a way to cut the same tokens over devices, micro-batches, remat and padding, the language-model
loss and every balance rule *alone*, with coefficient 1 and all other terms off, each with its gradient: the
coefficients are traced, so one compiled program answers for all of them. `agree` is the comparison of the grid.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe import axes, param
from moe.axes import MeshConfig
from moe.balance import (
    BalanceRule,
    EntropyConfig,
    ExpertBiasConfig,
    ImportanceConfig,
    LoadBalanceConfig,
    QuantileConfig,
    ShuffledLoadBalanceConfig,
    ZLossConfig,
)
from moe.config import check
from moe.dispatch import DispatchConfig, DroplessConfig
from moe.kernels.attend import AttendConfig
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.routing.base import RouterConfig
from moe.routing.topk import TopKConfig
from moe.train import loss as loss_module
from moe.train.run import RunConfig
from moe.train.state import TrainState
from moe.train.step import BATCH_LOGICAL, batch_gradient
from tests.grid_batch import POSITIONS as POSITIONS
from tests.grid_batch import SEQUENCES, VOCAB, batch, padded

EXPERTS, LAYERS = 8, 2
TOLERANCE = 1e-5
LM = "lm"
STEP = 3
"""The optimizer step that is computed."""
DROPLESS = DroplessConfig()
ROUTER = TopKConfig(init_std=0.3)

RULES: tuple[BalanceRule, ...] = (
    LoadBalanceConfig(name="global"),
    LoadBalanceConfig(name="lagged", accumulation="lagged"),
    LoadBalanceConfig(name="buffer", accumulation="buffer"),
    LoadBalanceConfig(name="sequence", scope="sequence"),
    LoadBalanceConfig(name="pairs", scope=2),
    LoadBalanceConfig(name="halves", scope=16),  # spans micro-batches whenever A > 2
    LoadBalanceConfig(name="devices", expert_groups=4),
    LoadBalanceConfig(name="switched", scope="sequence", scope_after=16, switch_step=STEP),
    ShuffledLoadBalanceConfig(name="shuffled", sequences=2),
    EntropyConfig(name="entropy"),
    ImportanceConfig(name="importance", scope=16),
    ZLossConfig(name="z"),
    QuantileConfig(name="quantile", bins=101, memory=0.5),
    ExpertBiasConfig(name="sign", rate=0.01),
    ExpertBiasConfig(name="sign_sequence", rate=0.02, scope="sequence"),
    ExpertBiasConfig(name="sign_groups", rate=0.03, scope=16),
    ExpertBiasConfig(name="recentred", rate=0.03, scope=16, recentre=True),
    ExpertBiasConfig(name="proportional", rate=0.04, rule="proportional", scope=2),
)
TERMS = tuple(rule.name for rule in RULES if not rule.moves_bias)
DEPENDS_ON_ACCUMULATION = ("buffer",)
"""Declared so by its docstring: equal only at the same A."""


ROUNDED = ("proportional", "recentred", "quantile")
"""Biases that sum floats; every other one counts in integers and is equal bit for bit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """A way to compute the same step."""

    mesh: tuple[tuple[str, int], ...] = ()
    accumulation: int = 1
    remat: str = "none"
    padding: str = "none"
    dispatch: DispatchConfig = DROPLESS
    router: RouterConfig = ROUTER
    attend: AttendConfig = AttendConfig()
    logit_chunk: int = 0
    pyramid: bool = False
    """The second layer has half as many experts as the first."""

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in self.mesh) or "one"
        attend = "" if self.attend.method == "whole" else f"-{self.attend.method}"
        dispatch = type(self.dispatch).__name__[:-6].lower()
        return f"{mesh}-A{self.accumulation}-{self.remat}-{self.padding}-{dispatch}{attend}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    values: dict[str, np.ndarray]
    """Loss with this term alone, coefficient 1."""
    gradients: dict[str, Any]
    """Its gradient, a tree of parameters."""
    terms: dict[str, np.ndarray]
    """[L] per rule, as logged."""
    count_LGE: np.ndarray
    """int32 load per sequence."""
    prob_LGE: np.ndarray
    dropped_LG: np.ndarray
    unserved_LG: np.ndarray
    tokens_G: np.ndarray
    states: dict[str, Any]
    """Balance state after the step."""
    reports: dict[str, np.ndarray]


def model_config(dispatch: DispatchConfig = DROPLESS, remat: Any = "none", **changes: Any) -> DecoderConfig:
    """2 layers of 8 experts, width 32, with a router far from uniform."""
    router: RouterConfig = changes.pop("router", ROUTER)
    heads = AttentionConfig(num_heads=4, num_kv_heads=2, head_width=8, attend=changes.pop("attend", AttendConfig()))
    if changes.pop("pyramid", False):
        sizes = (EXPERTS, EXPERTS // 2)
        experts = [MoEConfig(num_experts=E, expert_hidden=16, router=router, dispatch=dispatch) for E in sizes]
        stacks = tuple(StackConfig(layers=(heads, layer)) for layer in experts)
        return DecoderConfig(vocab_size=VOCAB, width=32, init_std=0.1, remat=remat, stacks=stacks, **changes)
    return DecoderConfig(
        **{
            "vocab_size": VOCAB,
            "width": 32,
            "num_layers": LAYERS,
            "init_std": 0.1,
            "remat": remat,
            "attention": heads,
            "moe": MoEConfig(num_experts=EXPERTS, expert_hidden=16, router=router, dispatch=dispatch),
        }
        | changes
    )


ALL = np.ones((LAYERS, EXPERTS), bool)


def balance_states(rules: tuple[BalanceRule, ...], seed: int = 1, exists_LE: np.ndarray = ALL) -> dict[str, Any]:
    """A state as it is in mid-run: biases that move the selection, last step's load far from uniform."""
    rng = np.random.default_rng(seed)
    states = {}
    for rule in rules:
        state = {name: np.asarray(value) for name, value in rule.init_state(exists_LE).items()}
        if "bias" in state:
            state["bias"] = (exists_LE * rng.normal(0, 0.02, exists_LE.shape)).astype(np.float32)
        if "load" in state:
            drawn_LE = exists_LE * rng.dirichlet(np.ones(EXPERTS), LAYERS)
            state["load"] = (drawn_LE / drawn_LE.sum(axis=1, keepdims=True)).astype(np.float32)
        states[rule.name] = state
    return states


@functools.cache
def host_params(router: RouterConfig = ROUTER, pyramid: bool = False) -> Any:
    """The parameters of `model_config()` on the host."""
    config = model_config(router=router, pyramid=pyramid)
    return jax.device_get(jax.jit(lambda: param.pure(config.build(jax.random.key(0))))())


def train_state(
    rules: tuple[BalanceRule, ...] = RULES, router: RouterConfig = ROUTER, pyramid: bool = False
) -> TrainState:
    """What `batch_gradient` reads of a state, on the host."""
    zero = np.zeros((), np.int32)
    exists_LE = model_config(router=router, pyramid=pyramid).exists_LE
    return TrainState(
        params=host_params(router, pyramid), balance=balance_states(rules, exists_LE=exists_LE), opt_state=(),
        step=zero + STEP, key=jax.random.key(1), skipped=zero, skipped_in_row=zero,
        idle_LE=np.zeros((LAYERS, EXPERTS), np.int32),
    )  # fmt: skip


def measure(
    cut: Cut, rules: tuple[BalanceRule, ...] = RULES, arrays: dict[str, np.ndarray] | None = None,
    put: Callable[[Any, Any], Any] = jax.device_put, get: Callable[[Any], Any] = jax.device_get,
    alone: tuple[str, ...] | None = None,
) -> Measured:  # fmt: skip
    """`put` and `get` are for several processes, which hold no whole array; `alone` leaves out other terms' losses."""
    arrays = padded(batch() if arrays is None else arrays, cut.padding)
    G = arrays["tokens"].shape[0]
    A = cut.accumulation
    mesh_config = MeshConfig(**({"data": 1} | dict(cut.mesh)))
    config = RunConfig(
        batch_size=G,
        accumulation=A,
        steps=200,
        mesh=mesh_config,
        balance=rules,
        model=model_config(
            cut.dispatch,
            cut.remat,
            router=cut.router,
            pyramid=cut.pyramid,
            attend=cut.attend,
            logit_chunk=cut.logit_chunk,
        ),
    )
    check(config)
    mesh = axes.make_mesh(mesh_config, jax.devices()[: mesh_config.num_devices])
    model = config.model.abstract()
    host = train_state(rules, cut.router, cut.pyramid)
    whole = NamedSharding(mesh, PartitionSpec())
    state = put(host, dataclasses.replace(
        jax.tree.map(lambda _: whole, host), params=param.shardings(model, mesh)
    ))  # fmt: skip
    cut_arrays = {
        name: put(value.reshape(A, G // A, -1), axes.sharding(mesh, BATCH_LOGICAL)) for name, value in arrays.items()
    }

    @jax.jit
    def program(weights: dict[str, jax.Array], state: TrainState, arrays: Any) -> Any:
        weighted = tuple(
            dataclasses.replace(rule, coefficient=weights[rule.name]) if rule.name in weights else rule
            for rule in rules
        )
        here = dataclasses.replace(config, balance=weighted)
        plain = loss_module.nats
        with mock.patch.object(loss_module, "nats", lambda *a: weights[LM] * plain(*a)):
            loss, grads, share = batch_gradient(here, model, state, arrays)
        stats = share.statistics
        states = {rule.name: rule.update(state.balance[rule.name], stats) for rule in rules}
        reports = {}
        for rule in rules:
            reports |= rule.report(share.records[rule.name], stats)
        terms = {name: value.sum(axis=0) for name, value in share.terms.items()}
        return loss, grads, (terms, stats, states, reports)

    names = (LM, *(rule.name for rule in rules if not rule.moves_bias))
    values, gradients = {}, {}
    with jax.set_mesh(mesh):
        for name in names if alone is None else alone:
            weights = {other: jnp.float32(other == name) for other in names}
            loss, grads, rest = get(program(weights, state, cut_arrays))
            values[name], gradients[name] = loss, grads
    terms, stats, states, reports = rest

    def in_order(leaf: np.ndarray) -> np.ndarray:  # [A, L, B, ...] -> [L, A*B, ...], the added sequences left out
        return np.moveaxis(leaf, 1, 0).reshape(leaf.shape[1], -1, *leaf.shape[3:])[:, :SEQUENCES]

    return Measured(
        values=values, gradients=gradients, terms=terms, states=states, reports=reports,
        count_LGE=in_order(stats.count_BE), prob_LGE=in_order(stats.prob_BE), dropped_LG=in_order(stats.dropped_B),
        unserved_LG=in_order(stats.unserved_B),
        tokens_G=in_order(stats.tokens_B)[0],
    )  # fmt: skip


measured = functools.cache(measure)
"""Shared by every test that asks for the same cut; only for arguments that hash."""


def agree(found: Measured, expected: Measured, *, same_accumulation: bool = False) -> None:
    """Raises AssertionError unless the two are the same step."""
    np.testing.assert_array_equal(found.count_LGE, expected.count_LGE, "load")
    np.testing.assert_array_equal(found.dropped_LG, expected.dropped_LG, "dropped")
    np.testing.assert_array_equal(found.unserved_LG, expected.unserved_LG, "unserved")
    np.testing.assert_array_equal(found.tokens_G, expected.tokens_G, "tokens")
    for name, state in expected.states.items():
        for key in state:
            if name in ROUNDED:
                close(found.states[name][key], state[key], f"state {name} {key}")
            else:
                np.testing.assert_array_equal(found.states[name][key], state[key], f"state {name} {key}")
    for name, value in expected.values.items():
        if name in DEPENDS_ON_ACCUMULATION and not same_accumulation:
            continue
        close(found.values[name], value, f"value {name}")
        if name in expected.terms:
            close(found.terms[name], expected.terms[name], f"term {name}")
        close_trees(found.gradients[name], expected.gradients[name], f"gradient {name}")


def close_trees(found: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    """Every leaf by itself: ||a - b|| <= tolerance ||b||."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        close(a, b, what + jax.tree_util.keystr(path), tolerance)


def close(found: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"{what}: shapes {a.shape} and {b.shape}"
    error, size = np.linalg.norm(a - b), np.linalg.norm(b)
    assert error <= tolerance * size, f"{what}: ||a - b|| = {error:.3g} is {error / max(size, 1e-38):.3g} of ||b||"
