"""The table of chips agrees with itself and with the peaks that MFU is counted against."""

import pytest

from moe.config import ConfigError
from moe.plan import peak_flops
from moe.plan.chips import CHIPS, chip

each_chip = pytest.mark.parametrize("name", CHIPS)


@each_chip
def test_the_peak_is_the_one_of_mfu(name: str) -> None:
    assert chip(name).flops == peak_flops(chip(name).device_kind)


@each_chip
def test_a_program_gets_less_than_the_chip_has(name: str) -> None:
    found = chip(name)
    assert 0.7 * found.hbm < found.usable <= found.hbm


@each_chip
def test_memory_is_faster_than_links_and_links_than_the_network(name: str) -> None:
    found = chip(name)
    assert found.flops > 100 * found.hbm_bandwidth
    assert found.hbm_bandwidth > 5 * found.link_bandwidth > 5 * found.dcn_bandwidth > 0


def test_an_unknown_chip_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"chip = 'v9': must be one of v4, v5e, v5p, v6e, tpu7x, h100, h200, b200"):
        chip("v9")
