"""Every combination of depth, dense layers and rhythm: kinds by their definition, stacks that spell the same layers."""

import itertools

import pytest

from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.models.layout import DENSE, MOE, Stack, layer_kinds, stacks

COMBINATIONS = [
    (num_layers, dense_layers, every)
    for num_layers, dense_layers, every in itertools.product(range(1, 9), range(9), range(1, 6))
    if dense_layers <= num_layers
]


def test_the_last_layer_of_every_whole_period_after_the_dense_ones_is_moe() -> None:
    for num_layers, dense_layers, every in COMBINATIONS:
        kinds = layer_kinds(num_layers, dense_layers, every)
        expected = [
            MOE if layer >= dense_layers and (layer - dense_layers) % every == every - 1 else DENSE
            for layer in range(num_layers)
        ]
        assert list(kinds) == expected, (num_layers, dense_layers, every)


def test_stacks_spell_the_layers_in_at_most_three_scans() -> None:
    for sizes in COMBINATIONS:
        found = stacks(*sizes)
        assert sum((stack.pattern * stack.repeats for stack in found), ()) == layer_kinds(*sizes), sizes
        assert len(found) <= 3 and all(stack.repeats > 0 for stack in found), sizes
        # One MoE layer in a pattern, its last: a scan over repeats then stacks statistics in layer order.
        for stack in found:
            assert stack.pattern.count(MOE) == (stack.pattern[-1] == MOE), sizes


def test_deeper_models_have_more_repeats_and_no_more_scans() -> None:
    assert stacks(61, 3, 1) == (Stack((DENSE,), 3), Stack((MOE,), 58))
    assert stacks(48, 0, 2) == (Stack((DENSE, MOE), 24),)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (DecoderConfig(num_layers=4), "mmmm"),
        (DecoderConfig(num_layers=5, dense_layers=1, moe_every=2, mlp_hidden=8), "ddmdm"),
        (DecoderConfig(num_layers=3, moe=None, mlp_hidden=8), "ddd"),
        (DecoderConfig(num_layers=3, moe=None, moe_every=2, mlp_hidden=8), "ddd"),
        (DecoderConfig(num_layers=2, dense_layers=1, moe=MoEConfig(), mlp_hidden=8), "dm"),
    ],
)
def test_a_decoder_config_knows_its_layers(config: DecoderConfig, kinds: str) -> None:
    assert "".join(kind[0] for kind in config.kinds) == kinds
    assert config.num_moe_layers == kinds.count("m")
    assert sum((stack.pattern * stack.repeats for stack in config.layout), ()) == config.kinds
