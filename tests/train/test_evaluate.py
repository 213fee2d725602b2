"""What an evaluation says of routing: frequencies that add up to K, top-k sums with their floor, kept choices."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes, param
from moe.axes import MeshConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.routing.activation_gate import ActivationGateConfig
from moe.routing.random_choice import RandomConfig
from moe.routing.temperature import TemperatureConfig
from moe.routing.topk import TopKConfig
from moe.train.evaluate import Evaluator, Measured
from moe.train.loss import Arrays
from moe.train.run import RunConfig
from tests import grid

B = 8


class HeldOut:
    """16 sequences of the grid's text, with its padding."""

    num_bytes = 1000

    def batches(self, batch: int, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
        whole = grid.batch()
        for first in range(0, 16, batch):
            yield {name: value[first : first + batch] for name, value in whole.items()}


class Corpus:
    domains = ("a",)

    def validation(self, name: str, max_bytes: int) -> HeldOut:
        return HeldOut()


def evaluate(
    model: DecoderConfig, watch: Any = None, keep: bool = False, change: Any = lambda p: p,
    *, step: int = 0, batch: int = B,
) -> Any:  # fmt: skip
    run = RunConfig(batch_size=batch, model=model, balance=())
    mesh = axes.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        corpus: Any = Corpus()
        evaluator = Evaluator(run, model.abstract(), corpus, mesh, keep_choices=keep)
        params = change(param.pure(model.build(jax.random.key(0))))
        bias_LE = jnp.zeros(model.exists_LE.shape)
        return evaluator.of(params, bias_LE, 1000, watch, step=np.int32(step))["a"]


def equal_scores(params: Any) -> Any:
    """The same model with router weights of 0."""
    zero = lambda path, leaf: leaf * 0 if "w_router" in jax.tree_util.keystr(path) else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(zero, params)


def test_frequencies_add_up_to_k_and_the_choices_are_those_counted() -> None:
    seen: list[Measured] = []

    def watch(measured: Measured, arrays: Arrays) -> None:
        seen.append(measured)

    found = evaluate(grid.model_config(router=TopKConfig(num_selected=3, init_std=0.3)), watch, keep=True)
    np.testing.assert_allclose(found.frequency_LE.sum(axis=1), 3.0, rtol=1e-5)
    np.testing.assert_allclose(found.load_LE, found.frequency_LE / 3, rtol=1e-5)
    assert (found.chosen_prob_L > 3 / 8 + 0.01).all() and (found.chosen_prob_L < 1).all()
    real = sum(int((arrays["segment_ids"][:, :-1] > 0).sum()) for arrays in HeldOut().batches(B, 0))
    counts = np.zeros((2, 9))
    for measured in seen:
        assert measured.expert_LBR is not None and measured.token_LBR is not None
        assert measured.expert_LBR.shape == measured.token_LBR.shape == (2, B, grid.POSITIONS * 3)
        for layer in range(2):
            np.add.at(counts[layer], np.asarray(measured.expert_LBR[layer]).ravel(), 1)
    np.testing.assert_allclose(counts[:, :8] / real, found.frequency_LE, rtol=1e-5)


def test_equal_scores_give_the_floor_k_over_e() -> None:
    found = evaluate(grid.model_config(router=TopKConfig(num_selected=2)), change=equal_scores)
    np.testing.assert_allclose(found.chosen_prob_L, 2 / 8, rtol=1e-6)
    np.testing.assert_array_equal(found.frequency_LE, [[1, 1, 0, 0, 0, 0, 0, 0]] * 2)  # of equals the lowest win


def test_choices_are_kept_only_if_asked_for() -> None:
    seen: list[Measured] = []
    evaluate(grid.model_config(), lambda measured, arrays: seen.append(measured))
    assert seen[0].expert_LBR is None and seen[0].token_LBR is None


@pytest.mark.parametrize("selected", [(2, 2), (2, 3)])
def test_layers_that_differ_keep_their_choices_if_they_are_equally_many(selected: tuple[int, int]) -> None:
    seen: list[Measured] = []
    plain = grid.model_config()
    assert plain.moe is not None
    wide, narrow = (
        dataclasses.replace(plain.moe, num_experts=E, router=TopKConfig(num_selected=K, init_std=0.3))
        for E, K in zip((8, 4), selected, strict=True)
    )
    stacks = tuple(StackConfig(layers=(plain.attention, part)) for part in (wide, narrow))
    defaults = {f.name: f.default for f in dataclasses.fields(DecoderConfig)}
    rhythm = {name: defaults[name] for name in ("num_layers", "attention", "moe")}
    model = dataclasses.replace(plain, stacks=stacks, **rhythm)  # type: ignore[arg-type]
    found = evaluate(model, lambda measured, arrays: seen.append(measured), keep=True)
    assert (seen[0].expert_LBR is None) == (selected[0] != selected[1])
    np.testing.assert_allclose(found.frequency_LE.sum(axis=1), selected, rtol=1e-5)
    assert not found.frequency_LE[1, 4:].any()


def test_a_temperature_is_that_of_the_step_that_is_evaluated() -> None:
    falling = TemperatureConfig(start=2.0, end=0.5, decay_steps=10)
    models = [
        grid.model_config(router=ActivationGateConfig(init_std=0.3, temperature=temperature))
        for temperature in (falling, TemperatureConfig(start=0.5, end=0.5))
    ]
    scheduled, constant = (evaluate(model, step=10) for model in models)
    np.testing.assert_allclose(scheduled.chosen_prob_L, constant.chosen_prob_L, rtol=1e-6)
    assert (scheduled.chosen_prob_L > evaluate(models[0]).chosen_prob_L + 0.01).all()


def test_draws_in_evaluation_depend_on_neither_the_batch_nor_the_step() -> None:
    model = grid.model_config(router=RandomConfig(num_selected=2))
    found, halved = evaluate(model, step=3), evaluate(model, step=7, batch=B // 2)
    np.testing.assert_array_equal(found.load_LE, halved.load_LE)
    np.testing.assert_allclose(found.nats, halved.nats, rtol=1e-5)


def test_a_dense_model_has_no_routing_to_speak_of() -> None:
    found = evaluate(grid.model_config(moe=None, mlp_hidden=16), keep=True)
    assert found.load_LE.shape == found.frequency_LE.shape == (0, 1) and found.chosen_prob_L.shape == (0,)
    assert found.num_tokens > 0 and np.isfinite(found.bits_per_byte)
