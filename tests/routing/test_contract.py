"""Every router of the package keeps the contract. A new one is met here without a line: it is found by its base class.

A router is a config that defines `route` or `build` in a module of `moe.routing`. Its examples are `EXAMPLES` in
`tests/routing/test_<module>.py`, or its default config; `NUM_EXPERTS` there replaces 8 where its grid needs another E.

Guards against: padding counted in f and P (MaxText, Levanter, AXLearn), routers that see the future in a decoder,
auxiliary losses as the only gradient of a router, noise or ties that depend on the number of devices.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest

import moe.routing
from moe.routing.base import RouterConfig
from tests.routing import contract, measuring
from tests.routing.contexts import context_for

NOT_ROUTERS = ("base",)


def router_types() -> Iterator[type[RouterConfig]]:
    """Configs that define `route` or `build` themselves, in order of their modules."""
    for info in pkgutil.iter_modules(moe.routing.__path__):
        module = importlib.import_module(f"moe.routing.{info.name}")
        for cls in vars(module).values():
            defined = isinstance(cls, type) and issubclass(cls, RouterConfig) and cls.__module__ == module.__name__
            if defined and info.name not in NOT_ROUTERS and {"route", "build"} & vars(cls).keys():
                yield cls


def file_of_tests(cls: type[RouterConfig]) -> str:
    return f"tests.routing.test_{cls.__module__.rpartition('.')[2]}"


def examples(cls: type[RouterConfig]) -> tuple[list[RouterConfig], int]:
    """(configs, number of experts) to test; the default config where no test file says more."""
    module = importlib.import_module(file_of_tests(cls)) if importlib.util.find_spec(file_of_tests(cls)) else None
    listed = [config for config in getattr(module, "EXAMPLES", []) if type(config) is cls]
    return listed or [cls()], getattr(module, "NUM_EXPERTS", contract.EXPERTS)


ROUTERS = list(router_types())
CASES = [
    pytest.param(config, E, id=f"{cls.__name__}-{index}")
    for cls in ROUTERS
    for configs, E in [examples(cls)]
    for index, config in enumerate(configs)
]


@pytest.mark.parametrize(("config", "num_experts"), CASES)
@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_the_contract_holds(check: contract.Check, config: RouterConfig, num_experts: int) -> None:
    check(config, num_experts)


@pytest.mark.parametrize("cls", ROUTERS, ids=lambda cls: cls.__name__)
def test_every_router_has_a_test_file(cls: type[RouterConfig]) -> None:
    path = file_of_tests(cls).replace(".", "/") + ".py"
    assert importlib.util.find_spec(file_of_tests(cls)), (
        f"{cls.__module__}.{cls.__name__} needs its own tests in {path}"
    )


@pytest.mark.parametrize("cls", ROUTERS, ids=lambda cls: cls.__name__)
def test_only_a_router_that_does_not_read_the_vectors_is_without_symmetry(cls: type[RouterConfig]) -> None:
    """Or the check of equivariance would be empty for it."""
    configs, E = examples(cls)
    for config in configs:
        if measuring.built(config, E).symmetry(jax.random.key(7), E) is None:
            context = context_for(measuring.B, measuring.S)
            one, other = (measuring.route(config, E, measuring.tokens(seed), context) for seed in (1, 2))
            jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_routers_of_the_package_are_found() -> None:
    assert {cls.__name__ for cls in ROUTERS} >= {"TopKConfig", "SwitchConfig", "SigmaConfig", "YuanConfig"}
