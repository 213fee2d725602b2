"""Balancing is cheap: what the compiled step sends and computes more for it, and the command that times it."""

import functools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import balance_cost
from launch.balance_cost import interval, main, verdict, without_statistics
from moe import axes
from moe.axes import MeshConfig
from moe.balance import BalanceRule, LoadBalanceConfig
from moe.train.run import RunConfig
from moe.train.state import init_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, jit_step, make_step
from tests import grid
from tests.collectives import Sent, collectives, elements

L, E, DEVICES = 3, grid.EXPERTS, 8
SEQUENCE = (LoadBalanceConfig(scope="sequence"),)
RULES: dict[str, tuple[int, tuple[BalanceRule, ...]]] = {
    "global": (1, (LoadBalanceConfig(),)),
    "buffer": (2, (LoadBalanceConfig(accumulation="buffer"),)),
    "lagged": (2, (LoadBalanceConfig(accumulation="lagged"),)),
}
each_rule = pytest.mark.parametrize("name", RULES)


@functools.cache
def compiled(accumulation: int, rules: tuple[BalanceRule, ...], statistics: bool = True) -> tuple[str, float]:
    """(program, FLOPs) of the train step of L layers in a scan, data-parallel over 8 devices."""
    config = RunConfig(
        batch_size=32, accumulation=accumulation, steps=200, balance=rules, mesh=MeshConfig(data=DEVICES),
        model=grid.model_config(num_layers=L),
    )  # fmt: skip
    model = config.model.abstract()
    tx = make_optimizer(config, model)
    mesh = axes.make_mesh(config.mesh)
    state = jax.eval_shape(lambda: init_state(config, tx, jax.random.key(0)))
    shape = (accumulation, 32 // accumulation, 17)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in grid.batch()}
    with jax.set_mesh(mesh):
        shardings = state_shardings(config, model, tx, mesh)
        step = jit_step(config, model, tx, mesh, shardings)
        if not statistics:
            plain = without_statistics(make_step(config, model, tx))
            step = jax.jit(plain, in_shardings=(shardings, axes.sharding(mesh, BATCH_LOGICAL)))
        program = step.lower(state, arrays).compile()
    return program.as_text(), program.cost_analysis()["flops"]


def more(accumulation: int, rules: tuple[BalanceRule, ...]) -> Counter[Sent]:
    """What the step sends beyond the one with the balance loss per sequence."""
    return collectives(compiled(accumulation, rules)[0]) - collectives(compiled(accumulation, SEQUENCE)[0])


@each_rule
def test_the_global_load_costs_one_reduction_of_the_counts_per_stack_of_layers(name: str) -> None:
    A, rules = RULES[name]
    extra = more(A, rules)
    assert {sent.kind for sent in extra} <= {"all-reduce"}
    # Once per micro-batch, after the loop over layers: never once per layer.
    assert all(sent.times <= A for sent in extra)
    assert elements(extra) <= A * 2 * L * E
    if name != "lagged":  # `lagged` counts for the next step, which the log does anyway
        assert extra[Sent("all-reduce", f"s32 {L * E}", A)] == 1


@each_rule
def test_the_global_scope_costs_less_than_one_percent_more_flops_than_the_sequence_scope(name: str) -> None:
    A, rules = RULES[name]
    assert 0.99 < compiled(A, rules)[1] / compiled(A, SEQUENCE)[1] < 1.01


def test_an_exact_load_under_accumulation_costs_a_forward() -> None:
    """The comparison sees a cost where there is one."""
    exact = (LoadBalanceConfig(),)
    extra = more(2, exact)
    assert elements(extra) > 2 * 2 * L * E and compiled(2, exact)[1] > 1.05 * compiled(2, SEQUENCE)[1]


def test_statistics_are_gone_from_the_step_without_them_and_send_nothing_per_layer() -> None:
    plain, full = compiled(1, (), statistics=False), compiled(1, RULES["global"][1])
    names = [" ".join(re.findall('op_name="(.*?)"', text)) for text in (full[0], plain[0])]
    for scope in ("/statistics", "(balance)"):
        assert scope in names[0] and scope not in names[1]
    extra = collectives(full[0]) - collectives(plain[0])
    assert extra and all(sent.kind == "all-reduce" and sent.times == 1 for sent in extra)
    assert 1.0 < full[1] / plain[1] < 1.02


def test_collectives_are_read_from_the_text_of_a_program() -> None:
    mesh = axes.make_mesh(MeshConfig(data=8))
    cut = axes.sharding(mesh, ("batch",))

    def body(total: Any, x: Any) -> Any:
        return total + x.sum(), None

    def program(x: Any) -> Any:
        return jax.lax.scan(body, jnp.float32(0), jnp.stack([x * n for n in range(5)]))[0], x.max()

    found = collectives(jax.jit(program, in_shardings=cut).lower(jnp.ones(16)).compile().as_text())
    assert found == {Sent("all-reduce", "f32 1", 5): 1, Sent("all-reduce", "f32 1", 1): 1}
    assert elements(found) == 6


TINY = [
    "--num-experts", "4", "--num-selected", "2", "--expert-hidden", "4", "--width", "8", "--num-layers", "1",
    "--seq-len", "8", "--batch-size", "2", "--pairs", "2", "--warmup", "1",
]  # fmt: skip


def test_the_command_measures_its_comparisons_and_writes_a_page(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    some = balance_cost.COMPARISONS[::4]  # the control and `exact`: three programs
    monkeypatch.setattr(balance_cost, "COMPARISONS", some)
    assert main([*TINY, "--out", str(tmp_path / "new" / "cost")]) == 0
    found = json.loads((tmp_path / "new" / "cost.json").read_text())
    text = (tmp_path / "new" / "cost.md").read_text()
    assert text in capsys.readouterr().out
    assert [one["label"] for one in found["comparisons"]] == [one.label for one in some]
    for one in found["comparisons"]:
        seconds = np.array(one["seconds"])
        assert seconds.shape == (2, 2) and (seconds > 0).all()
        assert one["ratio"] == pytest.approx(np.median(seconds[:, 0] / seconds[:, 1]))
        assert one["interval"][0] <= one["ratio"] <= one["interval"][1]
        assert f"| {one['label']} |" in text
    control, exact = (one["flops_ratio"] for one in found["comparisons"])
    assert control == 1 and exact > 1


def test_an_odd_batch_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--batch-size", "3"])
    assert "batch_size = 3: must be even" in capsys.readouterr().err


def test_the_interval_of_the_median_holds_it_and_narrows_with_the_pairs() -> None:
    rng = np.random.default_rng(0)
    few, many = (interval(rng.normal(1.0, 0.1, n), rng) for n in (20, 2000))
    assert few[0] < 1 < few[1] and many[1] - many[0] < 0.3 * (few[1] - few[0])
    assert interval(np.full(30, 1.5), rng) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.99, 1.01, "below"), (1.03, 1.05, "above"), (1.0, 1.03, "undecided")]
)
def test_a_limit_is_met_only_if_the_whole_interval_is_below_it(low: float, high: float, said: str) -> None:
    assert verdict({"interval": [low, high], "limit": 1.02}).startswith(said)
    assert verdict({"interval": [low, high], "limit": None}) == "reported"
