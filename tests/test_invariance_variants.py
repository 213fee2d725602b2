"""The invariance grid for routers that draw random numbers and for layers that differ in their number of experts."""

from unittest import mock

import pytest

from moe.balance import LoadBalanceConfig
from moe.dispatch import DenseConfig
from moe.routing.base import RouterConfig
from moe.routing.dense_to_sparse import DenseToSparseConfig
from moe.routing.product_key import ProductKeyConfig
from moe.routing.random_choice import RandomConfig
from moe.routing.sigma import SigmaConfig
from moe.routing.switch import SwitchConfig
from moe.routing.topk import TopKConfig
from tests import grid
from tests.grid import EXPERTS, RULES, Cut, agree, measure, measured
from tests.test_invariance import LAYOUTS, ORACLE

KINDS = tuple(
    rule for rule in RULES
    if rule.name in ("global", "lagged", "sequence", "shuffled", "entropy", "importance", "z", "quantile", "recentred")
)  # fmt: skip
JITTER = TopKConfig(init_std=0.3, jitter=0.1)
NOISY = [
    Cut(mesh=LAYOUTS["1 2 2 2"], accumulation=2, remat="full", padding="tokens", router=JITTER),
    Cut(mesh=LAYOUTS["data 8"], accumulation=4, padding="sequences", router=JITTER),
]
NOISY_ROUTERS: tuple[RouterConfig, ...] = (
    SwitchConfig(jitter=0.3, init_std=0.3),
    SigmaConfig(dropout=0.3, init_std=0.3),
    DenseToSparseConfig(threshold=0.05, init_std=0.3),
    ProductKeyConfig(grid=(4, 2), failure_rate=0.3, init_std=0.3),
    RandomConfig(num_selected=2),
)
PYRAMID = [
    Cut(mesh=LAYOUTS["2 2 2 1"], accumulation=2, remat="dots", padding="tokens", pyramid=True),
    Cut(mesh=LAYOUTS["fsdp 4 tensor 2"], accumulation=4, padding="sequences", pyramid=True),
]
IN_CHUNKS = Cut(mesh=LAYOUTS["1 2 2 2"], accumulation=2, remat="offload", padding="tokens", logit_chunk=11)


def test_a_loss_in_chunks_and_layers_on_the_host_are_the_same_step() -> None:
    rules = (LoadBalanceConfig(name="global"),)
    agree(measured(IN_CHUNKS, rules), measured(Cut(), rules))


@pytest.mark.parametrize("cut", NOISY, ids=str)
def test_a_noisy_router_draws_the_same_under_every_cut(cut: Cut) -> None:
    expected = measured(Cut(dispatch=DenseConfig(), router=JITTER), KINDS)
    assert (expected.count_LGE != measured(ORACLE).count_LGE).any(), "the jitter moves no token"
    agree(measured(cut, KINDS), expected)


@pytest.mark.parametrize("router", NOISY_ROUTERS, ids=lambda router: type(router).__name__)
def test_every_other_noisy_router_too(router: RouterConfig) -> None:
    rules = (LoadBalanceConfig(name="global"), LoadBalanceConfig(name="sequence", scope="sequence"))
    rules = rules if router.task_gradient else ()
    expected = measured(Cut(dispatch=DenseConfig(), router=router), rules)
    with mock.patch.object(grid, "STEP", grid.STEP + 1):
        assert (expected.count_LGE != measure(Cut(router=router), rules).count_LGE).any(), "no noise"
    cut = Cut(mesh=LAYOUTS["1 2 2 2"], accumulation=2, remat="full", padding="tokens", router=router)
    agree(measured(cut, rules), expected)


@pytest.mark.parametrize("cut", PYRAMID, ids=str)
def test_layers_with_different_numbers_of_experts_are_the_same_step_under_every_cut(cut: Cut) -> None:
    expected = measured(Cut(dispatch=DenseConfig(), pyramid=True), KINDS)
    assert expected.count_LGE[0, :, EXPERTS // 2 :].any() and not expected.count_LGE[1, :, EXPERTS // 2 :].any()
    assert expected.count_LGE[0].sum() == expected.count_LGE[1].sum()
    agree(measured(cut, KINDS), expected)
