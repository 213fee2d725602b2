"""Names of topologies: what they stand for, and what is said of those that do not exist."""

import importlib.util

import jax
import pytest

from moe.config import ConfigError
from moe.plan import topology
from moe.plan.topology import devices, parse


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("v5p:4x4x8", 128),
        ("v5p:2x2x1", 4),
        ("v6e:16x16", 256),
        ("v5e:1x1", 1),
        ("tpu7x:4x4x4", 128),  # two devices a chip
        ("2*v5e:4x4", 32),
        ("h200:2x8", 16),
    ],
)
def test_a_name_says_how_many_devices(name: str, number: int) -> None:
    found = parse(name)
    assert found.num_devices == number and str(found) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p", "must be [SLICES*]CHIP:SHAPE"),
        ("v5p:", "must be [SLICES*]CHIP:SHAPE"),
        ("v9:2x2", "must be one of v4, v5e"),
        ("v5e:3x3", "the nearest are v5e:2x4, v5e:4x4"),
        ("v5e:4x4x4", "the nearest are v5e:8x8"),
        ("v5p:4x4x5", "the nearest are v5p:4x4x4"),
        ("v5p:8x4x4", "the nearest are v5p:4x4x8"),
        ("v5p:48x48x48", "is no slice of v5p"),
        ("0*v5p:4x4x4", "is no slice"),
        ("h200:8", "must be HOSTSxDEVICES"),
        ("h200:1x9", "at most 8 devices a host"),
        ("v4:2x2x1", "cannot be compiled for"),
        ("b200:1x8", "must be one of h100, h200"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(name)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_every_offered_shape_parses() -> None:
    for chip in ("v5e", "v5p", "tpu7x"):
        for shape in topology.shapes(topology.chip(chip)):
            assert parse(f"{chip}:{'x'.join(map(str, shape))}").shape == shape


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"topology = 'v5p:2x2x1': needs the TPU compiler: pip install \"moe\[tpu\]\""
    ):
        devices(parse("v5p:2x2x1"))


NEEDED = r"topology = 'h200:2x8': needs the CUDA compiler: pip install \"moe\[gpu\]\" \(not implemented for cuda\)$"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotImplementedError("not implemented for cuda\nand more"), NEEDED),
        (
            jax.errors.JaxRuntimeError("INVALID_ARGUMENT: 2x8\nand more"),
            r"topology = 'h200:2x8': the CUDA compiler refuses: INVALID_ARGUMENT: 2x8$",
        ),
    ],
)
def test_a_missing_cuda_plugin_is_told_from_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def asked(**asked: object) -> None:
        assert asked["topology"] == "1x2x8" and asked["platform"] == "cuda"
        assert "device_memory_size: 150754820096" in str(asked["target_config"])
        raise error

    monkeypatch.setattr(topology.topologies, "get_topology_desc", asked)
    with pytest.raises(ConfigError, match=said):
        devices(parse("h200:2x8"))


def test_an_error_that_is_no_answer_about_the_topology_is_not_dressed_up_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(**asked: object) -> None:
        raise RuntimeError("out of threads")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", asked)
    with pytest.raises(RuntimeError, match=r"^out of threads$"):
        devices(parse("h200:2x8"))
