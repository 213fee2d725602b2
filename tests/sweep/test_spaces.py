"""What a sweep is made of: which points, under which names, and that whatever cannot run is refused in one line."""

import dataclasses
from typing import Any

import pytest

from configs import debug
from configs.sweeps import experts, routers
from moe.config import ConfigError
from moe.routing.switch import SwitchConfig
from moe.routing.topk import TopKConfig
from moe.sweep import Configs, Grid, Listed, Space, Sweep, Zip, configs_in
from moe.sweep.changes import with_value

BASE = debug.get_config()
RATE, EXPERTS, HIDDEN = "optim.learning_rate", "model.moe.num_experts", "model.moe.expert_hidden"


def names(space: Space, **fields: Any) -> list[str]:
    return [run.name for run in Sweep(variants=space, base=BASE, **fields).runs()]


def test_a_grid_has_every_combination_and_the_last_path_changes_fastest() -> None:
    runs = Sweep(variants=Grid(over={EXPERTS: (4, 8), RATE: (1e-3, 1e-2)}), base=BASE).runs()
    assert [run.name for run in runs] == [
        "num_experts=4,learning_rate=0.001",
        "num_experts=4,learning_rate=0.01",
        "num_experts=8,learning_rate=0.001",
        "num_experts=8,learning_rate=0.01",
    ]
    assert [(run.config.model.moe.num_experts, run.config.optim.learning_rate) for run in runs] == [
        (4, 1e-3), (4, 1e-2), (8, 1e-3), (8, 1e-2),
    ]  # fmt: skip


def test_a_zip_takes_values_together() -> None:
    assert names(Zip(over={EXPERTS: (4, 8), HIDDEN: (64, 32)})) == [
        "num_experts=4,expert_hidden=64", "num_experts=8,expert_hidden=32",
    ]  # fmt: skip


def test_products_and_sums_combine_spaces_in_order() -> None:
    listed = Listed(of={"plain": {}, "wide": {HIDDEN: 64}})
    assert names(listed * Grid(over={RATE: (1e-3, 1e-2)})) == [
        "plain,learning_rate=0.001", "plain,learning_rate=0.01",
        "wide,learning_rate=0.001", "wide,learning_rate=0.01",
    ]  # fmt: skip
    assert names(listed + Grid(over={EXPERTS: (4,)})) == ["plain", "wide", "num_experts=4"]


def test_whole_configs_carry_their_docstring_and_take_changes() -> None:
    def small():  # type: ignore[no-untyped-def]
        """few
        experts

        Not in the note."""
        return dataclasses.replace(BASE, batch_size=4)

    space = Configs(of={"small": small, "as_is": BASE}) * Grid(over={EXPERTS: (4,)})
    runs = Sweep(variants=space).runs()
    assert [(run.name, run.note) for run in runs] == [
        ("small,num_experts=4", "few experts"),
        ("as_is,num_experts=4", ""),
    ]
    assert [(run.config.batch_size, run.config.model.moe.num_experts) for run in runs] == [(4, 4), (8, 4)]


def test_a_path_is_cut_to_what_tells_it_from_the_others_and_configs_are_named_by_type() -> None:
    routers = (TopKConfig(num_selected=2), SwitchConfig())
    space = Grid(over={"steps": (20, 30), "model.moe.router": routers})
    assert names(space)[:2] == ["steps=20,router=TopK", "steps=20,router=Switch"]
    both = Grid(over={"checkpoint.every": (5, 10), "evaluate.every": (10,)})
    assert names(both)[0] == "checkpoint.every=5,evaluate.every=10"


def test_seeds_run_one_after_the_other_in_folders_of_their_own() -> None:
    runs = Sweep(variants=Listed(of={"a": {}, "b": {"steps": 30}}), base=BASE, seeds=(3, 1)).runs()
    assert [run.folder for run in runs] == ["a/seed-3", "b/seed-3", "a/seed-1", "b/seed-1"]
    assert [run.config.seed for run in runs] == [3, 3, 1, 1]


def test_the_filter_and_the_changes_of_the_command_line_reach_every_config() -> None:
    space = Grid(over={EXPERTS: (4, 8, 16)})
    assert names(space, keep=lambda config: config.model.moe.num_experts < 16) == ["num_experts=4", "num_experts=8"]
    runs = Sweep(variants=space, base=BASE).runs([("steps", 40)])
    assert {run.config.steps for run in runs} == {40}


def test_the_sweeps_of_the_repository_are_sound() -> None:
    assert len(routers.get_sweep().runs()) == 2 * len(list(configs_in(routers.routers).points())) == 40
    assert len(experts.get_sweep().runs()) == 3 * 3 * 2


@pytest.mark.parametrize(
    ("space", "fields", "said"),
    [
        (Grid(over={"optim.lerning_rate": (1.0,)}), {}, "optim.lerning_rate = 1.0: AdamWConfig has no field"),
        (Grid(over={"optim.lerning_rate": (1.0,)}), {}, "nearest: learning_rate"),
        (Grid(over={EXPERTS: (4, 0)}), {}, "variant 'num_experts=0': model.moe.num_experts = 0: must be at least 2"),
        (Grid(over={EXPERTS: ("four",)}), {}, "model.moe.num_experts = 'four': must be int, got str"),
        (Grid(over={"model.pipeline.num_microbatches": (2,)}), {}, "pipeline is None, which has no field"),
        (Grid(over={"balance.7.coefficient": (0.1,)}), {}, "'7' must be an index below 3"),
        (Grid(over={EXPERTS: ()}), {}, "grid: model.moe.num_experts = (): must be a tuple of at least one value"),
        (Grid(over={"steps": "20"}), {}, "grid: steps = '20': must be a tuple"),
        (Zip(over={EXPERTS: (4, 8), HIDDEN: (64,)}), {}, "model.moe.num_experts has 2, model.moe.expert_hidden has 1"),
        (Grid(over={"seed": (0, 1)}), {}, "seed: is no variant; give the sweep's `seeds`"),
        (Grid(over={RATE: (1e-3, 1e-3)}), {}, "2 variants are called 'learning_rate=0.001'"),
        (Listed(of={"a": {}, "b": {"steps": 20}}), {}, "variants 'a' and 'b' are the same config"),
        (Listed(of={"a": {"steps": 30}}) * Grid(over={"steps": (40,)}), {}, "steps = 40: is set twice"),
        (Listed(of={"a": {}}), {"base": None}, "variant 'a': changes no config"),
        (Configs(of={"a": BASE}) * Configs(of={"b": BASE}), {}, "'a' and 'b' are both whole configs"),
        (Configs(of={"a": lambda: 3}), {}, "configs = 'a': must return a RunConfig, got int"),  # type: ignore[dict-item, return-value]
        (Listed(of={"a/b": {}}), {}, "variant 'a/b': must be a name of letters"),
        (Listed(of={"report": {}}), {}, "variant 'report': must be a name"),
        (Listed(of={"a": {}}), {"seeds": (0, 0)}, "seeds = (0, 0): must be at least one and each only once"),
        (Listed(of={"a": {}}), {"seeds": (-1,)}, "seed = -1: must be at least 0"),
        (Listed(of={"a": {}}), {"baseline": "b"}, "baseline = 'b': is none of the variants a"),
        (Listed(of={"a": {}}), {"keep": lambda config: False}, "has no variant that `keep` keeps"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(space: Space, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Sweep(variants=space, **{"base": BASE, **fields}).runs()
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_value_must_be_of_the_fields_type() -> None:
    assert with_value(BASE, RATE, 1).optim.learning_rate == 1.0
    assert isinstance(with_value(BASE, RATE, 1).optim.learning_rate, float)
    assert with_value(BASE, "profile", (2, 3)).profile == (2, 3)
    assert with_value(BASE, "profile", None).profile is None
    assert with_value(BASE, "balance.0.coefficient", 0.5).balance[0].coefficient == 0.5
    assert with_value(BASE, "data.domain_weights", "equal").data.domain_weights == "equal"
    for path, value in (
        ("steps", True), ("steps", 2.0), ("profile", (1, 2, 3)), ("profile", (1, "2")), ("data.domain_weights", "even"),
        ("model.moe.router", BASE.model.moe), ("balance", (3,)),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"must be|got"):
            with_value(BASE, path, value)
