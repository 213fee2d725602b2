"""Finedeep against its equations, written out, and against the dense layer it splits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import param
from moe.config import ConfigError, check
from moe.layers.finedeep import Finedeep, FinedeepConfig
from moe.layers.mlp import MLP
from moe.layers.norm import RMSNorm
from tests.layers.sublayers import B, D, S, build, check_contract, inputs, run

CONFIG = FinedeepConfig(num_sublayers=3, num_experts=4, expert_hidden=8, scale=1.5)


def by_numpy(module: Finedeep, x: np.ndarray, scale: float) -> np.ndarray:
    """h_J - x, expert by expert, the score from the expert's output as the paper has it."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), param.pure(module))
    h = x.astype(np.float64)
    for _, part in sorted(w["sublayers"].items()):
        u = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-6) * part["norm"]["scale"]
        total = np.zeros(h.shape)
        for i in range(part["w_gate"].shape[0]):
            gate, up = u @ part["w_gate"][i], u @ part["w_up"][i]
            out = (gate / (1 + np.exp(-gate)) * up) @ part["w_down"][i]
            total += out * scale / (1 + np.exp(-out @ part["w_router"][i]))[..., None]
        h = h + total
    return h - x


def test_it_equals_the_equations_written_out() -> None:
    module, x = build(CONFIG), inputs()
    expected = by_numpy(module, np.asarray(x), 1.5)
    np.testing.assert_allclose(run(module, x), expected, rtol=1e-4, atol=1e-4)
    # The score matters: without it the layer is another one.
    unscored = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if "w_router" in jax.tree_util.keystr(path) else leaf, param.pure(module)
    )
    assert not np.allclose(run(param.bind(module, unscored), x), expected, rtol=1e-2, atol=1e-2)


def test_one_sublayer_whose_scores_are_one_is_the_dense_layer_it_was_cut_from() -> None:
    # scale 2 and a router of zeros: 2 sigmoid(0) = 1.
    dense = MLP(jax.random.key(5), D, 32, 0.3, 0.3)
    module = build(FinedeepConfig(num_sublayers=1, num_experts=4, expert_hidden=8, scale=2.0))
    params, whole = param.pure(module), param.pure(dense)
    columns = lambda w: w.reshape(D, 4, 8).transpose(1, 0, 2)  # noqa: E731
    part = params["sublayers"][0] | {
        "w_gate": columns(whole["w_gate"]), "w_up": columns(whole["w_up"]), "w_down": whole["w_down"].reshape(4, 8, D),
        "w_router": jnp.zeros((4, D)),
    }  # fmt: skip
    x = inputs()
    found = run(param.bind(module, {"sublayers": {0: part}}), x)
    np.testing.assert_allclose(found, dense(RMSNorm(D)(x)), rtol=1e-4, atol=1e-5)


def test_it_keeps_the_contract_of_sublayers() -> None:
    check_contract(CONFIG)


def test_parameters_are_those_of_the_dense_layer_with_routers_and_norms_beside() -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(param.pure(build(CONFIG))))
    J, E, F = 3, 4, 8
    dense = sum(leaf.size for leaf in jax.tree.leaves(param.pure(MLP(jax.random.key(0), D, J * E * F, 1.0, 1.0))))
    assert size == dense + J * E * D + J * D
    assert CONFIG.multiply_adds(D, S) == dense and CONFIG.active_share == 1.0


def test_every_token_passes_every_expert_whatever_its_neighbours_are() -> None:
    module, x = build(CONFIG), inputs()
    whole = run(module, x)
    for b, s in ((0, 0), (B - 1, S - 1)):
        np.testing.assert_allclose(run(module, x[b : b + 1, s : s + 1])[0, 0], whole[b, s], rtol=1e-5, atol=1e-5)
    params = param.pure(module)
    for i in range(4):
        part = params["sublayers"][1]
        without = part | {"w_down": part["w_down"].at[i].set(0.0)}
        changed = run(param.bind(module, {"sublayers": params["sublayers"] | {1: without}}), x)
        assert bool((jnp.abs(changed - whole).max(axis=-1) > 0).all()), i


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_sublayers": 0}, "num_sublayers = 0: must be at least 1"),
        ({"scale": 0.0}, "scale = 0.0: must be greater than 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check(dataclasses.replace(CONFIG, **changes))
