"""Configs: round trip, diff, order, fingerprint, and errors of one line with path, value and limit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moe import config as c
from moe.axes import MeshConfig
from moe.balance import ExpertBiasConfig, LoadBalanceConfig
from moe.config import ConfigError
from moe.dispatch import CapacityConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.optim import AdamWConfig, WarmupStableDecayConfig
from moe.train.run import RunConfig

RUN = RunConfig(
    steps=300,
    model=DecoderConfig(moe=MoEConfig(dispatch=CapacityConfig(keep="score"))),
    balance=(LoadBalanceConfig(scope=4), ExpertBiasConfig(scope="sequence")),
    optim=AdamWConfig(schedule=WarmupStableDecayConfig(), lr_scale=(("router", 0.5), ("embed", 0.0))),
)  # fmt: skip


def changed(path: str, value: Any, config: Any = RUN) -> Any:
    name, _, rest = path.partition(".")
    old = getattr(config, name)
    if isinstance(old, tuple) and rest:
        index, _, below = rest.partition(".")
        new: Any = tuple(changed(below, value, x) if i == int(index) else x for i, x in enumerate(old))
    else:
        new = changed(rest, value, old) if rest else value
    return dataclasses.replace(config, **{name: new})


def test_a_config_comes_back_from_a_file_as_the_very_same_object(tmp_path: Path) -> None:
    for config in (RUN, RunConfig(), RunConfig(model=DecoderConfig(moe=None, mlp_hidden=8), profile=(2, 3))):
        c.save(config, tmp_path / "config.json")
        loaded = c.load(tmp_path / "config.json")
        assert loaded == config and c.fingerprint(loaded) == c.fingerprint(config)
        assert hash(loaded) == hash(config)
        json.loads((tmp_path / "config.json").read_text())


def test_saved_configs_name_their_types() -> None:
    data = c.to_dict(RUN)
    assert data["model"]["moe"]["dispatch"]["type"] == "moe.dispatch.capacity:CapacityConfig"
    assert [rule["type"].split(":")[1] for rule in data["balance"]] == [
        "LoadBalanceConfig",
        "ExpertBiasConfig",
    ]


def test_unknown_fields_and_types_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"MeshConfig has no field 'pipeline'; it has context, data, expert"):
        c.from_dict(c.to_dict(MeshConfig()) | {"pipeline": 2})
    with pytest.raises(ConfigError, match=r"'moe.axes:make_mesh' is not a config type"):
        c.from_dict({"type": "moe.axes:make_mesh"})


def test_the_printed_config_is_sorted_and_complete() -> None:
    lines = c.render(RUN).splitlines()
    assert lines == sorted(lines) and len(lines) > 50
    assert "balance.0.scope = 4" in lines and "balance.1.scope = 'sequence'" in lines
    assert "optim.lr_scale = (('router', 0.5), ('embed', 0.0))" in lines


@pytest.mark.parametrize(
    ("path", "value"),
    [("seed", 1), ("balance.0.scope", 8), ("balance.0.scope", "global"), ("optim.lr_scale", ()),
     ("balance", ()), ("mesh.data", 2), ("profile", (1, 2))],
)  # fmt: skip
def test_every_change_shows_in_the_diff_and_in_the_fingerprint(path: str, value: Any) -> None:
    new = changed(path, value)
    assert c.fingerprint(new) != c.fingerprint(RUN)
    found = c.diff(RUN, new)
    assert found and all(line.startswith(path) for line in found)
    assert c.diff(new, new) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherCapacity(CapacityConfig):
    """The same fields and values under another type."""


def test_another_type_with_the_same_values_is_another_config() -> None:
    new = changed("model.moe.dispatch", OtherCapacity(keep="score"))
    assert c.fingerprint(new) != c.fingerprint(RUN) and new != RUN
    name = f"{OtherCapacity.__module__}:OtherCapacity"
    assert c.diff(RUN, new) == [f"model.moe.dispatch.type: 'moe.dispatch.capacity:CapacityConfig' -> '{name}'"]
    fewer = changed("balance", RUN.balance[:1])
    assert all(line.endswith("-> None") for line in c.diff(RUN, fewer))
    assert {line.split(":")[0].rsplit(".", 1)[0] for line in c.diff(RUN, fewer)} == {"balance.1"}


def test_a_diff_names_path_old_and_new_value() -> None:
    assert c.diff(RUN, changed("optim.learning_rate", 0.5)) == ["optim.learning_rate: 0.003 -> 0.5"]
    types = c.diff(RUN, changed("model.moe.dispatch", CapacityConfig(keep="order")))
    assert types == ["model.moe.dispatch.keep: 'score' -> 'order'"]


BAD: list[tuple[str, Any, str]] = [
    ("steps", 0, "steps = 0: must be at least 1"),
    ("balance.1.rate", -1.0, "balance.1.rate = -1.0: must be greater than 0"),
    ("balance.1.name", "load_balance", "balance.1.name = 'load_balance': must differ"),
    ("model.moe.dispatch.capacity_factor", 0.0, "model.moe.dispatch.capacity_factor = 0.0: must be greater than 0"),
    (
        "balance.0.scope",
        5,
        r"balance.0.scope = 5: must divide the 64 sequences .* 1, 2, 4, 8, 16, 32, 64",
    ),
    ("accumulation", 3, "batch_size = 64: must be divisible by accumulation = 3"),
    ("mesh.fsdp", 3, "batch_size = 64: a micro-batch of 64 .* divisible by data [*] fsdp = 3"),
    ("mesh.tensor", 4, "model.vocab_size = 258: must be divisible by mesh.tensor = 4"),
    ("mesh.expert", 16, "model.moe.num_experts = 8: must be divisible by mesh.expert = 16"),
    ("optim.schedule.warmup_steps", 300, "optim.schedule.warmup_steps = 300: must be less than steps = 300"),
    ("profile", (5, 2), r"profile = \(5, 2\): must be first and last step"),
    ("mesh.data", 0, "mesh.data = 0: must be at least 1"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[case[0] for case in BAD])
def test_a_bad_value_is_answered_in_one_line_with_path_value_and_limit(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        c.check(changed(path, value))
    assert "\n" not in str(error.value)


def test_the_example_and_the_defaults_are_without_problems() -> None:
    c.check(RUN)
    c.check(RunConfig())


def test_a_prefix_names_where_a_part_was_checked() -> None:
    with pytest.raises(ConfigError, match=r"^model.width = 1: must be at least 2"):
        c.check(DecoderConfig(width=1), "model")
