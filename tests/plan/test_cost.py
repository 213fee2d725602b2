"""The cost model: every term by hand on small examples, and what must never get slower or faster."""

import dataclasses

import pytest

from moe.dispatch.all_to_all import AllToAllConfig
from moe.models.pipeline import PipelineConfig
from moe.plan.chips import CHIPS, chip
from moe.plan.cost import Assumptions, cost, fastest, forwards, mfu
from moe.plan.links import Link, link, torus
from moe.plan.traits import head_multiply_adds, traits
from tests.plan.test_memory import TINY, tiny

V5P = chip("v5p")
IDEAL = Assumptions(efficiency=1.0, expert_efficiency=1.0, overlap=0.0, imbalance=1.0, latency=0.0)
# No memory to wait for, so that products alone count.
FAST_MEMORY = dataclasses.replace(V5P, hbm_bandwidth=1e30)


def test_products_are_counted_by_hand():
    found = cost(tiny(devices=1), FAST_MEMORY, IDEAL)
    # Attention: 2 D N H + 2 D M H + N H S; experts K * 3 D F; logits D V. Remat: 4 passes, logits 3.
    attention, experts, logits = 2 * 8 * 8 + 2 * 8 * 4 + 8 * 16, 2 * 3 * 8 * 16, 8 * 16
    tokens = 4 * 16
    assert found.dense == pytest.approx(2 * tokens * (4 * 2 * attention + 3 * logits) / V5P.flops)
    assert found.experts == pytest.approx(2 * tokens * 4 * 2 * experts / V5P.flops)
    assert (found.weights, found.tensor, found.context, found.exchange, found.bubble) == (0, 0, 0, 0, 0)


def test_the_update_reads_four_arrays_and_writes_three():
    size = sum(one.size * one.repeats for trait in traits(TINY, 16) for one in trait.weights) + 16 * 8 + 8
    assert cost(tiny(devices=1), V5P, IDEAL).update == pytest.approx(28 * size / V5P.hbm_bandwidth)


def test_a_gather_sends_all_but_its_own_part():
    assert Link(4, 4, 10.0, 1, 1.0).gather(8.0, 0.5) == 0.5 + 8 * 3 / 4 / 10
    assert Link(1, 1, 10.0, 1, 1.0).gather(8.0, 0.5) == 0
    # 4 devices on 2 slices: inside as with 2, and each sends half of the other slice's part across.
    assert Link(4, 2, 10.0, 1, 1.0).gather(8.0, 0.0) == 8 * 1 / 2 / 10 + 8 / 2 * 1 / 2


def test_an_all_to_all_is_limited_by_the_bisection_of_the_torus():
    assert Link(4, 4, 10.0, 1, 1.0).all_to_all(8.0, 0.0) == 8 * 3 / 4 / 10
    assert Link(16, 16, 10.0, 16, 1.0).all_to_all(8.0, 0.0) == 8 * 16 / 4 / 10


def test_a_torus_is_as_even_as_its_size_allows():
    assert [torus(n, 3) for n in (64, 128, 512)] == [(4, 4, 4), (4, 4, 8), (8, 8, 8)]
    assert torus(256, 2) == (16, 16)


def test_a_group_uses_the_links_of_the_axes_it_stretches_over():
    one, all_three = link(V5P, 512, 8, 1), link(V5P, 512, 512, 1)
    assert all_three.bandwidth == 3 * one.bandwidth == 6 * V5P.link_bandwidth
    assert link(V5P, 512, 8, 64).bandwidth == one.bandwidth  # the last axis alone


def test_a_group_beyond_a_slice_goes_over_the_data_centre():
    v5e = chip("v5e")
    assert link(v5e, 1024, 1024, 1).inner == 256
    assert link(v5e, 1024, 4, 256).inner == 1
    assert link(chip("h100"), 16, 16, 1).inner == 8


def test_weights_are_hidden_behind_computation_as_far_as_assumed():
    seen = cost(tiny(fsdp=2), V5P, IDEAL).weights
    hidden = cost(tiny(fsdp=2), V5P, dataclasses.replace(IDEAL, overlap=1e9)).weights
    assert seen > 0 == hidden


def test_replicas_reduce_their_gradients_in_every_micro_batch():
    once, twice = (cost(tiny(data=2, accumulation=A), FAST_MEMORY, IDEAL).weights for A in (1, 2))
    assert twice == pytest.approx(2 * once) and once > 0


def test_each_axis_pays_for_what_it_sends():
    def of(**mesh):
        return cost(tiny(devices=2, **mesh), V5P, IDEAL)

    assert of(tensor=2).tensor > 0 == of(fsdp=2).tensor
    assert of(context=2).context > 0 == of(fsdp=2).context
    assert of(fsdp=2, expert=2).exchange > 0 == of(fsdp=2).exchange


def test_an_exchange_sends_rows_there_and_back_in_every_pass():
    moe = dataclasses.replace(TINY.moe, exchange=AllToAllConfig(budget=1.5))
    model = dataclasses.replace(TINY, moe=moe)
    found = cost(tiny(model=model, fsdp=2, expert=2), V5P, IDEAL).exchange
    sent = 32 * 2 * 1.5 * 8 * 2  # tokens, K, budget, D, bytes
    once = sent / 2 / (2 * V5P.link_bandwidth)
    assert found == pytest.approx(2 * 2 * 3 * once)  # layers; there and back; forward, again, backward
    kept = cost(tiny(model=dataclasses.replace(model, remat="collectives"), fsdp=2, expert=2), V5P, IDEAL).exchange
    assert kept == pytest.approx(2 * 2 * 2 * once)


def test_the_bubble_is_that_of_the_pipeline():
    model = dataclasses.replace(TINY, pipeline=PipelineConfig(microbatches=2))
    found = cost(tiny(model=model, stages=2), FAST_MEMORY, IDEAL)
    busy = found.dense + found.experts
    assert found.bubble / (busy + found.bubble) == pytest.approx(1 / 3)


def test_imbalance_slows_the_experts_alone():
    even, skewed = (
        cost(tiny(fsdp=2, expert=2), FAST_MEMORY, dataclasses.replace(IDEAL, imbalance=factor)) for factor in (1.0, 1.5)
    )
    assert skewed.experts == pytest.approx(1.5 * even.experts)
    assert skewed.dense == even.dense


def test_more_accumulation_is_never_faster():
    seconds = [cost(tiny(fsdp=2, accumulation=A), V5P).step for A in (1, 2)]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("remat", ["none", "dots", "save_attention", "collectives", "full"])
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4, "expert": 2}, {"fsdp": 2, "tensor": 2, "expert": 4}])
def test_no_mesh_is_faster_than_the_bound(remat, mesh):
    work = tiny(devices=4, model=dataclasses.replace(TINY, remat=remat), **mesh)
    assert fastest(work, V5P, Assumptions()) <= cost(work, V5P).step


def test_what_a_policy_keeps_is_done_once():
    assert [forwards("none", "experts"), forwards("full", "experts"), forwards("offload", "dense")] == [1, 2, 2]
    assert [forwards("save_attention", kind) for kind in ("attention", "dense", "exchange")] == [1, 2, 2]


def test_mfu_is_1_when_nothing_but_model_flops_takes_time():
    work = tiny(devices=1, model=dataclasses.replace(TINY, remat="none"))
    found = cost(work, FAST_MEMORY, IDEAL)
    assert mfu(work, V5P, found.dense + found.experts) == pytest.approx(1.0)
    assert head_multiply_adds(TINY) == 8 * 16


@pytest.mark.parametrize("name", CHIPS)
def test_every_chip_can_be_planned_for(name):
    assert 0 < cost(tiny(devices=4, fsdp=4, expert=4), chip(name)).step < float("inf")
