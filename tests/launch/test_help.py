"""`--help` explains every field of every config there is, and every type of config survives saving."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from configs import debug, folder, quickstart, reference, routers
from launch.cli import load_functions, parse
from moe import config as configs
from moe.balance import (
    BalanceRule,
    ExpertBiasConfig,
    ImportanceConfig,
    QuantileConfig,
    ShuffledLoadBalanceConfig,
)
from moe.data import (
    ByteConfig,
    DataConfig,
    FilesConfig,
    FolderConfig,
    HuggingFaceConfig,
    MixtureConfig,
    SentencePieceConfig,
    SourceConfig,
    StdlibConfig,
    TfdsConfig,
    TokenizerConfig,
)
from moe.dispatch import AllToAllConfig, CapacityConfig, DenseConfig, DispatchConfig, ExchangeConfig, RaggedConfig
from moe.layers.attention import AttentionConfig
from moe.layers.base import SublayerConfig
from moe.layers.finedeep import FinedeepConfig
from moe.layers.mixture_of_attention import MixtureOfAttentionConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.layers.parallel import ParallelConfig
from moe.layers.peer import PEERConfig
from moe.layers.product_key_memory import ProductKeyMemoryConfig
from moe.layers.rope import RopeConfig
from moe.models import DecoderConfig
from moe.models.ahead import AheadConfig
from moe.models.layout import StackConfig
from moe.models.pipeline import PipelineConfig
from moe.optim import ScheduleConfig, WarmupStableDecayConfig
from moe.routing.base import RouterConfig
from moe.train.ladder import LadderConfig
from moe.train.run import RunConfig

BASES = (
    BalanceRule, DispatchConfig, ExchangeConfig, RopeConfig, RouterConfig, ScheduleConfig, SourceConfig, SublayerConfig,
    TokenizerConfig,
)  # fmt: skip


STRUCTURE = (
    "balance", "ladder", "model.moe", "model.ahead", "model.pipeline", "model.stacks", "model.moe.router.tasks",
    "model.moe.exchange.budget",
)  # fmt: skip
"""Leaves that are no options: None, () or tuples of tuples. Structure is chosen in Python."""


def alternatives() -> dict[str, RunConfig]:
    """RunConfigs that together hold every type of config there is."""
    base = debug.get_config()

    def with_data(source: SourceConfig, tokenizer: TokenizerConfig) -> RunConfig:
        return dataclasses.replace(base, data=DataConfig(source=source, tokenizer=tokenizer))

    def with_moe(**changes: Any) -> RunConfig:
        assert base.model.moe is not None
        moe = dataclasses.replace(base.model.moe, **changes)
        return dataclasses.replace(base, model=dataclasses.replace(base.model, moe=moe))

    stable = dataclasses.replace(base.optim, schedule=WarmupStableDecayConfig(), lr_scale=(("router", 0.5),))
    mixture = MixtureConfig(parts=(FolderConfig(path="a"), StdlibConfig()), weights=(1.0, 2.0))
    block = StackConfig(layers=(ParallelConfig(parts=(AttentionConfig(), MoEConfig())), MLPConfig()), repeats=2)
    others = (MixtureOfAttentionConfig(), FinedeepConfig(), ProductKeyMemoryConfig(), PEERConfig())
    every_router = load_functions(routers.__file__)
    return {name: make() for name, make in every_router.items()} | {  # type: ignore[misc]
        "quickstart": quickstart.get_config(),
        "debug": base,
        "folder": folder.get_config(),
        "latent attention": reference.deepseek_v3(),
        "gated shared expert": reference.qwen2_57b(),
        "capacity": with_moe(dispatch=CapacityConfig(capacity_factor=1.5, keep="score")),
        "budget": with_moe(exchange=AllToAllConfig(budget=1.5)),
        "ragged": with_moe(exchange=RaggedConfig()),
        "ladder": dataclasses.replace(base, ladder=LadderConfig()),
        "pipeline": dataclasses.replace(base, model=dataclasses.replace(base.model, pipeline=PipelineConfig())),
        "dense dispatch": with_moe(dispatch=DenseConfig()),
        "stable": dataclasses.replace(base, optim=stable, profile=(3, 5)),
        "files": with_data(FilesConfig(paths=("a.jsonl", "b.parquet")), HuggingFaceConfig(path="tokenizer.json")),
        "tfds": with_data(TfdsConfig(name="lm1b:1.1.0"), SentencePieceConfig(path="a.model")),
        "mixture": with_data(mixture, ByteConfig()),
        "stacks": dataclasses.replace(
            base, model=DecoderConfig(vocab_size=264, stacks=(block, StackConfig(layers=others)), ahead=AheadConfig())
        ),
        "rules": dataclasses.replace(
            base, balance=(ExpertBiasConfig(), ImportanceConfig(), QuantileConfig(), ShuffledLoadBalanceConfig())
        ),
        "no experts": dataclasses.replace(base, model=dataclasses.replace(base.model, moe=None)),
    }


ALTERNATIVES = alternatives()
each_alternative = pytest.mark.parametrize("name", ALTERNATIVES)


def concrete(base: type) -> set[type]:
    """The config types below `base` that the package defines and builds on no further."""
    below = [sub for sub in base.__subclasses__() if sub.__module__.startswith("moe.")]
    return {kind for sub in below for kind in concrete(sub) or {sub}}


def help_of(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Option -> its help without metavariable and default, as `--help` prints it."""
    with pytest.raises(SystemExit) as stop:
        parse(type(config), ["--help"], "train", default=config)
    assert stop.value.code == 0
    said = re.sub(r"[\u2500-\u257f]", " ", capsys.readouterr().out)
    found = {}
    for block in re.split(r"^\s+(?=--[a-z])", said, flags=re.MULTILINE)[1:]:
        head, _, rest = re.split(r"\n\s*\n|\n [a-z.0-9]+ options", block)[0].partition("\n")
        # Beside the option where there is room, else below it.
        option, *beside = re.split(r"\s{2,}", head.strip(), maxsplit=1)
        text = " ".join(" ".join([*beside, rest]).split())
        found[option.split()[0]] = re.sub(r"\((default|required|repeatable).*", "", text).strip()
    return found


def test_the_alternatives_hold_every_type_of_config() -> None:
    held = {type(part) for config in ALTERNATIVES.values() for _, part in configs.walk(config)}
    assert set().union(*(concrete(base) for base in BASES)) <= held


@each_alternative
def test_every_type_of_config_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    configs.save(ALTERNATIVES[name], tmp_path / "config.json")
    assert configs.load(tmp_path / "config.json") == ALTERNATIVES[name]


@each_alternative
def test_every_field_is_an_option_with_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = help_of(ALTERNATIVES[name], capsys)
    for path in configs.flatten(ALTERNATIVES[name]):
        if path.split(".")[-1] == configs.TYPE_KEY or path in STRUCTURE:
            continue
        option = "--" + path.replace("_", "-")
        assert option in options, f"{path} is no option"
        assert options[option], f"{path} has no help: add an attribute docstring"


def test_a_field_without_help_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(RunConfig):
        """A run."""

        unexplained: int = 3

    options = help_of(Silent(), capsys)
    assert options["--unexplained"] == "" and options["--steps"] == "Optimizer steps."
