"""AdamW against numpy, what decays, what is clipped, and learning rates by path.

Guards against: Megatron PR #5916 (the gradient norm left experts out under expert parallelism), MoE weights decayed or
frozen by a pattern that matched nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe import axes, param
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.optim.adamw import path_scales
from moe.train.run import RunConfig
from moe.train.state import make_optimizer
from tests import grid

CONSTANT = WarmupCosineConfig(warmup_steps=0, final_fraction=1.0)
PARAMS = {"a": {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}, "scale": jnp.array([1.0, 2.0])}
GRADS = {"a": {"w": jnp.array([[0.3, -0.1], [0.0, 2.0]])}, "scale": jnp.array([-0.5, 0.25])}
DECAY = {"a": {"w": True}, "scale": False}


def steps(config: AdamWConfig, grads: list[Any], params: Any = PARAMS) -> Any:
    tx = config.build(params, DECAY, 10)
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw_numpy(
    grads: list[Any], lr: float, clip: float, decay: float, b1: float, b2: float, eps: float
) -> dict[str, Any]:
    w = {"w": np.asarray(PARAMS["a"]["w"], np.float64), "scale": np.asarray(PARAMS["scale"], np.float64)}
    m, v = {k: 0 * x for k, x in w.items()}, {k: 0 * x for k, x in w.items()}
    for t, tree in enumerate(grads, 1):
        g = {"w": np.asarray(tree["a"]["w"], np.float64), "scale": np.asarray(tree["scale"], np.float64)}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for k in w:
            clipped = g[k] * min(1, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * clipped
            v[k] = b2 * v[k] + (1 - b2) * clipped**2
            step = m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            w[k] = w[k] - lr * (step + (decay * w[k] if k == "w" else 0))
    return w


@pytest.mark.parametrize("clip", [0.5, 100.0])
def test_three_steps_equal_numpy(clip: float) -> None:
    grads = [GRADS, jax.tree.map(lambda g: -0.3 * g + 0.1, GRADS), jax.tree.map(lambda g: g**2, GRADS)]
    config = AdamWConfig(learning_rate=0.1, schedule=CONSTANT, clip_norm=clip, weight_decay=0.2, eps=1e-3, beta1=0.8)
    found = steps(config, grads)
    expected = adamw_numpy(grads, 0.1, clip, 0.2, 0.8, 0.95, 1e-3)
    np.testing.assert_allclose(found["a"]["w"], expected["w"], rtol=1e-5)
    np.testing.assert_allclose(found["scale"], expected["scale"], rtol=1e-5)


def test_with_no_gradient_only_matrices_decay() -> None:
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    found = steps(AdamWConfig(learning_rate=0.1, schedule=CONSTANT, weight_decay=0.5), [zero])
    np.testing.assert_allclose(found["a"]["w"], PARAMS["a"]["w"] * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(found["scale"], PARAMS["scale"])


def test_in_the_model_everything_but_the_norm_scales_decays() -> None:
    config = RunConfig(model=grid.model_config(), optim=AdamWConfig(schedule=CONSTANT, weight_decay=0.5))
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), param.pure(model))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decays = {
        jax.tree_util.keystr(path): bool(leaf.any()) for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    assert {path for path, yes in decays.items() if not yes} == {path for path in decays if "norm" in path}
    assert sum("norm" in path for path in decays) == 3  # two stacked ones of the layers, one at the end


def test_a_factor_of_zero_freezes_exactly_and_leaves_the_norm() -> None:
    config = AdamWConfig(learning_rate=0.1, schedule=CONSTANT, clip_norm=0.1, lr_scale=(("w$", 0.0),))
    found = steps(config, [GRADS])
    np.testing.assert_array_equal(found["a"]["w"], PARAMS["a"]["w"])
    alone = dict(GRADS, a={"w": jnp.zeros((2, 2))})
    without = steps(AdamWConfig(learning_rate=0.1, schedule=CONSTANT, clip_norm=0.1), [alone])
    np.testing.assert_array_equal(found["scale"], without["scale"])


def test_the_last_matching_pattern_scales_the_learning_rate() -> None:
    scales = path_scales(PARAMS, ((".", 0.5), ("scale", 2.0)))
    assert scales == {"a": {"w": 0.5}, "scale": 2.0}
    config = AdamWConfig(learning_rate=0.1, schedule=CONSTANT, lr_scale=((".", 0.5), ("scale", 2.0)))
    plain = AdamWConfig(learning_rate=0.1, schedule=CONSTANT)
    moved, expected = steps(config, [GRADS]), steps(plain, [GRADS])
    np.testing.assert_allclose(moved["scale"] - PARAMS["scale"], 2 * (expected["scale"] - PARAMS["scale"]), rtol=1e-5)
    np.testing.assert_allclose(
        moved["a"]["w"] - PARAMS["a"]["w"], (expected["a"]["w"] - PARAMS["a"]["w"]) / 2, rtol=1e-4
    )


def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest_paths() -> None:
    params = param.pure(grid.model_config().abstract())
    with pytest.raises(
        ConfigError, match=r"optim.lr_scale = 'moe.w_gat\$': found in no parameter path; the nearest are .*w_gate"
    ):
        path_scales(params, (("moe.w_gat$", 0.0),))


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"beta2 = 1.0: must be at least 0 and less than 1"):
        check(AdamWConfig(beta2=1.0))
    with pytest.raises(ConfigError, match=r"lr_scale = .*'\(' is not a regular expression"):
        check(AdamWConfig(lr_scale=(("(", 1.0),)))
    with pytest.raises(ConfigError, match=r"clip_norm = 0: must be greater than 0"):
        check(AdamWConfig(clip_norm=0))


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"data": 8, "expert": 8}, {"fsdp": 4, "tensor": 2, "expert": 2}], ids=str
)
def test_clipping_counts_every_parameter_once_on_a_sharded_mesh(sizes: dict[str, int]) -> None:
    model = grid.model_config().abstract()
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), param.pure(model))
    expected = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    mesh = axes.make_mesh(MeshConfig(**({"data": 1} | sizes)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(grads, param.shardings(model, mesh))
        clip = optax.clip_by_global_norm(1.0)
        norm, clipped = jax.jit(lambda g: (optax.tree.norm(g), clip.update(g, clip.init(g))[0]))(placed)
    np.testing.assert_allclose(norm, expected, rtol=1e-5)
    grid.close_trees(jax.device_get(clipped), jax.tree.map(lambda g: g / expected, grads), "clipped")
