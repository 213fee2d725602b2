"""Rhythm, stacks and letters: every combination spells the layers its definition says, and bad ones are refused."""

import dataclasses
import itertools
from typing import Any

import pytest

from moe import config as configs
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.layers.attention import AttentionConfig
from moe.layers.base import SublayerConfig
from moe.layers.mlp import MLPConfig
from moe.layers.moe import MoEConfig
from moe.layers.parallel import ParallelConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig, Stacks, first_block, in_order, parse_layout, rhythm, split_at
from moe.plan import count, train_flops_per_token
from moe.train.run import RunConfig

A, F, M = AttentionConfig(), MLPConfig(hidden=8), MoEConfig(num_experts=4)
LETTER = {A: "a", F: "d", M: "m"}
COMBINATIONS = [
    (num_layers, dense_layers, every)
    for num_layers, dense_layers, every in itertools.product(range(1, 9), range(9), range(1, 6))
    if dense_layers <= num_layers
]


def made(num_layers: int, dense_layers: int, every: int) -> Stacks:
    return rhythm(A, F, M, num_layers=num_layers, dense_layers=dense_layers, every=every)


def spelled(stacks: Stacks) -> str:
    return "|".join(f"{''.join(LETTER[c] for c in stack.layers)}*{stack.repeats}" for stack in stacks)


def letters(stacks: Stacks) -> str:
    return "".join(LETTER[config] for config in in_order(stacks))


def test_the_last_layer_of_every_whole_period_after_the_dense_ones_is_moe() -> None:
    for num_layers, dense_layers, every in COMBINATIONS:
        expected = [
            "am" if layer >= dense_layers and (layer - dense_layers) % every == every - 1 else "ad"
            for layer in range(num_layers)
        ]
        found = made(num_layers, dense_layers, every)
        assert letters(found) == "".join(expected), (num_layers, dense_layers, every)
        assert len(found) <= 3 and all(stack.repeats > 0 for stack in found)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((4, 0, 1), "am*4"),
        ((4, 1, 1), "ad*1|am*3"),
        ((4, 0, 2), "adam*2"),
        ((6, 1, 2), "ad*1|adam*2|ad*1"),
        ((7, 2, 3), "ad*2|adadam*1|ad*2"),
        ((3, 3, 1), "ad*3"),
        ((3, 0, 4), "ad*3"),
        ((61, 3, 1), "ad*3|am*58"),
        ((48, 0, 2), "adam*24"),
    ],
)
def test_deeper_models_have_more_repeats_and_no_more_scans(sizes: tuple[int, int, int], expected: str) -> None:
    assert spelled(made(*sizes)) == expected


@pytest.mark.parametrize(
    ("config", "kinds", "where"),
    [
        (DecoderConfig(num_layers=4), "mmmm", (0, 1, 2, 3)),
        (DecoderConfig(num_layers=5, dense_layers=1, moe_every=2, mlp_hidden=8), "ddmdm", (2, 4)),
        (DecoderConfig(num_layers=3, moe=None, mlp_hidden=8), "ddd", ()),
        (DecoderConfig(num_layers=3, moe=None, moe_every=2, mlp_hidden=8), "ddd", ()),
        (DecoderConfig(num_layers=2, dense_layers=1, moe=MoEConfig(), mlp_hidden=8), "dm", (1,)),
    ],
)
def test_a_decoder_config_knows_its_layers(config: DecoderConfig, kinds: str, where: tuple[int, ...]) -> None:
    labels = [sublayer.label for sublayer in in_order(config.layout)]
    assert labels == [x for kind in kinds for x in ("attention", "moe" if kind == "m" else "mlp")]
    assert (config.num_moe_layers, config.moe_layers) == (len(where), where)
    assert config.num_experts_L == (8,) * len(where)


def test_letters_give_the_sublayers_in_order() -> None:
    block = parse_layout("a m d a m d m d", a=A, m=M, d=F)  # Brainformer's first block
    assert letters((StackConfig(layers=block),)) == "amdamdmd"
    assert parse_layout("  a\n experts ", a=A, experts=M) == (A, M)
    with pytest.raises(ConfigError, match=r"^layout = 'a x': no sublayer is called 'x'; there are a, m$"):
        parse_layout("a x", a=A, m=M)
    with pytest.raises(ConfigError, match=r"^layout = 'a a': 'm' does not occur in it$"):
        parse_layout("a a", a=A, m=M)


def test_the_order_of_sublayers_changes_neither_parameters_nor_flops() -> None:
    def model(layout: str, repeats: int = 1) -> DecoderConfig:
        return DecoderConfig(stacks=(StackConfig(layers=parse_layout(layout, a=A, m=M, d=F), repeats=repeats),))

    one, other, twice = model("a m d a m d m d"), model("d m a m d d a m"), model("a m d a m d m d", 2)
    assert count(one) == count(other)
    assert train_flops_per_token(one, 16) == train_flops_per_token(other, 16)
    assert count(twice).experts == 2 * count(one).experts == 2 * 3 * 4 * 3 * 128 * 256  # three of E = 4, D = 128
    rest = count(twice).total - 2 * count(one).total
    assert rest == -(258 * 128 + 128)  # embedding and last norm are there once


def test_stacks_spell_what_the_rhythm_derives() -> None:
    by_rhythm = DecoderConfig(num_layers=6, dense_layers=1, moe_every=2, mlp_hidden=8, moe=M, attention=A)
    by_stacks = DecoderConfig(stacks=by_rhythm.layout)
    check(by_stacks)
    assert by_stacks.layout == by_rhythm.layout and count(by_stacks) == count(by_rhythm)
    assert configs.from_dict(configs.to_dict(by_stacks)) == by_stacks


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 5), ("dense_layers", 1), ("moe_every", 2), ("mlp_hidden", 8),
     ("attention", AttentionConfig(num_heads=8)), ("moe", None)],
)  # fmt: skip
def test_stacks_beside_a_rhythm_are_refused(field: str, value: Any) -> None:
    config = dataclasses.replace(DecoderConfig(stacks=(StackConfig(layers=(A, M)),)), **{field: value})
    with pytest.raises(ConfigError, match=rf"^model\.{field} = .*: is ignored, as `stacks` spells the layers out"):
        check(config, "model")


@pytest.mark.parametrize(
    ("stacks", "said"),
    [
        ((StackConfig(layers=()),), r"stacks\.0\.layers = \(\): must hold at least one sublayer"),
        ((StackConfig(layers=(A,)), StackConfig(layers=(F,), repeats=0)), r"stacks\.1\.repeats = 0: must be at least"),
        ((StackConfig(layers=(A, MLPConfig(hidden=0))),), r"stacks\.0\.layers\.1\.hidden = 0: must be at least 1"),
    ],
)  # fmt: skip
def test_a_bad_stack_is_refused_with_its_place(stacks: Stacks, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^model\\.{said}"):
        check(DecoderConfig(stacks=stacks), "model")


def test_the_first_block_reaches_up_to_the_second_attention() -> None:
    def at(*layouts: tuple[str, int]) -> tuple[int, str]:
        kinds: dict[str, SublayerConfig] = {"a": A, "d": F, "m": M}
        stacks = tuple(StackConfig(layers=tuple(kinds[x] for x in text), repeats=n) for text, n in layouts)
        found = split_at(stacks, first_block(stacks))
        assert letters(found) == letters(stacks)
        return first_block(stacks), spelled(found)

    assert at(("am", 4)) == (2, "am*1|am*3")
    assert at(("am", 1), ("ad", 2)) == (2, "am*1|ad*2")
    assert at(("adam", 3)) == (2, "adam*1|adam*2")
    assert at(("d", 3), ("am", 2)) == (5, "d*3|am*1|am*1")
    assert at(("a", 3), ("m", 2)) == (1, "a*1|a*2|m*2")
    assert at(("dad", 2)) == (4, "dad*1|dad*1")
    assert at(("d", 3)) == (3, "d*3")


BLOCK = ParallelConfig(parts=(AttentionConfig(num_heads=4, num_kv_heads=2), MoEConfig(num_experts=6)))


@pytest.mark.parametrize(
    ("model", "mesh", "said"),
    [
        (DecoderConfig(), MeshConfig(expert=3), r"model\.moe\.num_experts = 8: must be divisible by mesh\.expert = 3"),
        (
            DecoderConfig(dense_layers=1, mlp_hidden=9),
            MeshConfig(tensor=2),
            r"model\.mlp_hidden = 9: must be divisible by mesh\.tensor = 2",
        ),
        (DecoderConfig(width=129), MeshConfig(fsdp=2), r"model\.width = 129: must be divisible by mesh\.fsdp = 2"),
        (
            DecoderConfig(stacks=(StackConfig(layers=(A, M)), StackConfig(layers=(MoEConfig(num_experts=6),)))),
            MeshConfig(expert=4),
            r"model\.stacks\.1\.layers\.0\.num_experts = 6: must be divisible by mesh\.expert = 4",
        ),
        (
            DecoderConfig(vocab_size=260, stacks=(StackConfig(layers=(BLOCK,)),)),
            MeshConfig(tensor=4),
            r"model\.stacks\.0\.layers\.0\.parts\.0\.num_kv_heads = 2: must be divisible by mesh\.tensor = 4",
        ),
    ],
)
def test_a_mesh_that_cannot_cut_a_sublayer_is_refused_with_its_path(
    model: DecoderConfig, mesh: MeshConfig, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check(RunConfig(model=model, mesh=dataclasses.replace(mesh, data=1), batch_size=48))


def test_a_rhythm_without_dense_layers_is_not_asked_to_cut_their_mlp() -> None:
    prefixes = [prefix for prefix, _ in DecoderConfig().sublayers]
    assert prefixes == ["attention.", "moe."]
    assert [prefix for prefix, _ in DecoderConfig(moe=None, mlp_hidden=8).sublayers] == ["attention.", "mlp_"]
