"""The search: equal to costing everything, never worse than a layout by hand, and clear about what is missing."""

import dataclasses
import re

import pytest

from configs import reference
from launch.plan import legal, planned, workload
from moe.folding import MeshConfig
from moe.plan import search
from moe.plan.chips import chip
from moe.plan.cost import Assumptions, cost
from moe.plan.memory import least_bytes, memory
from moe.plan.search import (
    Infeasible,
    Space,
    best,
    candidates,
    describe,
    divides,
    divisors,
    every,
    fits,
    judge,
    meshes,
    smallest,
)
from moe.plan.topology import parse
from tests.plan.test_memory import TINY, tiny

V5P = chip("v5p")
SMALL = Space(remat=("full", "none"), max_tensor=2, max_context=2, max_expert_tensor=2)


COMPUTE_BOUND = Assumptions(latency=0, overlap=1e9, imbalance=1.0)


def accepts(work):
    return work.microbatch % (work.mesh.data * work.mesh.fsdp) == 0


def short_of(gigabytes):
    return dataclasses.replace(V5P, usable=round(gigabytes * 1e9))


def limit(share):
    """Memory that so large a share of the layouts fits into."""
    sizes = sorted(plan.memory.total for plan in every(tiny(devices=4), V5P, accepts, space=SMALL))
    return short_of(sizes[round(share * (len(sizes) - 1))] / 1e9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top", [1, 4])
# Where products alone take time, the bound on what cannot win is as tight as it gets.
@pytest.mark.parametrize("assume", [Assumptions(), COMPUTE_BOUND])
def test_the_search_finds_what_costing_everything_finds(share, top, assume):
    small = limit(share)
    whole = every(tiny(devices=4), small, accepts, space=SMALL, assume=assume)
    found = best(tiny(devices=4), small, accepts, space=SMALL, top=top, assume=assume)
    assert len({(plan.work.mesh, plan.work.model) for plan in found}) == len(found)
    assert [plan.seconds for plan in found] == [plan.seconds for plan in _without_more(whole)[:top]]
    assert found[0].work == whole[0].work
    assert all(plan.memory.total <= small.usable for plan in found)


def _without_more(plans):
    """Of plans that differ in accumulation alone the one with the least."""
    seen, kept = set(), []
    for plan in sorted(plans, key=lambda plan: plan.work.accumulation):
        if (key := (plan.work.mesh, plan.work.model)) not in seen:
            seen.add(key)
            kept.append(plan)
    return sorted(kept, key=lambda plan: plan.seconds)


WIDE = dataclasses.replace(
    TINY, width=1024, moe=dataclasses.replace(TINY.moe, expert_hidden=4096),
    attention=dataclasses.replace(TINY.attention, head_width=256),
)  # fmt: skip
"""Products take nearly all of its time, so nearly every layout is close to the bound."""


@pytest.mark.parametrize("top", [1, 4])
@pytest.mark.parametrize("seq_len", [512, 4096])
def test_a_bound_on_time_leaves_out_some_layouts_and_none_that_wins(monkeypatch, seq_len, top):
    work = dataclasses.replace(tiny(devices=4, model=WIDE), seq_len=seq_len)
    asked = {"space": dataclasses.replace(SMALL, remat=("full", "save_attention")), "assume": COMPUTE_BOUND}
    whole = _without_more(every(work, V5P, accepts, **asked))
    costed = []
    monkeypatch.setattr(search, "cost", lambda *given: costed.append(given) or cost(*given))
    found = best(work, V5P, accepts, top=top, **asked)
    assert [plan.seconds for plan in found] == [plan.seconds for plan in whole[:top]]
    if seq_len == 4096 and top == 1:
        assert len(costed) < 0.8 * len(whole)


def test_the_bound_on_memory_is_one_and_spares_asking_what_is_legal():
    work = tiny(devices=4, model=WIDE)
    space = Space(max_stages=2, max_tensor=2, max_context=2, remat=(*SMALL.remat, "offload", "dots"))
    legal_ones, asked = [], []
    groups = list(candidates(work, space, lambda one: legal_ones.append(one) is None))
    totals = [(least_bytes(one), memory(one).total) for group in groups for one in group]
    assert any(group[0].model.pipeline for group in groups)
    assert all(least < total for least, total in totals)
    tight = short_of(min(total for _, total in totals) / 1e9 * 1.01)
    best(work, tight, lambda one: asked.append(one) is None, space=space)
    assert len(asked) < 0.8 * len(legal_ones)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0, 1.1])
def test_what_fits_nowhere_is_told_by_the_leanest_of_all_layouts(share):
    """Fits or not, and by which layout it does not, as without leaving anything out."""
    every_one = [one for group in candidates(tiny(devices=4), SMALL, accepts) for one in group]
    leanest = min(every_one, key=lambda one: memory(one).total)
    small = short_of(share * memory(leanest).total / 1e9)
    assert fits(tiny(devices=4), small, accepts, space=SMALL) == (share >= 1)
    if share < 1:
        with pytest.raises(Infeasible, match=rf"The leanest: {re.escape(describe(leanest))}$"):
            best(tiny(devices=4), small, accepts, space=SMALL)


def test_more_memory_never_makes_the_best_slower():
    seconds = [best(tiny(devices=4), limit(share), accepts, space=SMALL, top=1)[0].seconds for share in (0.0, 0.5, 1.0)]
    assert seconds == sorted(seconds, reverse=True)


def test_every_mesh_of_the_space_is_legal_and_there_once():
    found = list(meshes(tiny(devices=8), Space(max_stages=2)))
    assert len(found) == len(set(found)) > 50
    for mesh in found:
        sizes = mesh.sizes(8)
        assert 4 % sizes["expert"] == 0 and sizes["stages"] <= 2
    assert MeshConfig(data=1, fsdp=8, expert=4) in found


def test_a_mesh_must_cut_every_parameter_evenly():
    assert divides(tiny(devices=8), MeshConfig(data=1, fsdp=8))
    assert not divides(tiny(devices=16), MeshConfig(data=1, fsdp=16))  # D = 8


def test_pipelines_are_tried_when_asked_for():
    found = best(
        tiny(devices=4), V5P, lambda work: work.mesh.stages == 2, space=Space(remat=("full",), max_stages=2), top=1
    )[0]
    assert found.work.model.pipeline is not None and found.cost.bubble > 0


def test_what_is_illegal_is_never_proposed():
    found = best(tiny(devices=4), V5P, lambda work: accepts(work) and work.mesh.data == 2, space=SMALL, top=8)
    assert {plan.work.mesh.data for plan in found} == {2}


def test_an_infeasible_request_says_what_is_missing():
    large = tiny(devices=4, model=dataclasses.replace(TINY, vocab_size=2**24))
    fsdp = lambda work: work.mesh.fsdp == 4  # noqa: E731
    with pytest.raises(Infeasible) as said:
        best(large, short_of(0.5), fsdp, space=SMALL)
    first, _, second = str(said.value).partition(": nothing fits. The leanest layout needs ")
    assert first == "4 v5p with 4 sequences of 16"
    # 2^24 rows of 8: 0.13 G parameters and two moments of 4 bytes over 4 devices, and much more on the way.
    assert re.match(r"\d+\.\d GB on a device that has 0\.5 \(", second)
    assert "in all, where 4 chips have 0.00 TB" in second and "fsdp=4" in second
    with pytest.raises(Infeasible, match=r"no mesh, remat policy and accumulation .* passes the run's own checks"):
        best(tiny(devices=4), V5P, lambda work: False, space=SMALL)


def test_the_smallest_number_of_chips_that_fits_is_named():
    needs = min(memory(dataclasses.replace(tiny(devices=2), mesh=MeshConfig(fsdp=2, tensor=1))).total, 1e9)
    tight = dataclasses.replace(V5P, usable=round(needs * 0.9))
    model = dataclasses.replace(TINY, remat="full")
    assert smallest(tiny(devices=1, model=model), tight, accepts, space=Space(remat=("full",))) in (2, 4)
    assert smallest(tiny(devices=1), short_of(1e-9), accepts, space=SMALL, most=2) is None


def test_divisors():
    assert (divisors(12), divisors(12, 4)) == ([1, 2, 3, 4, 6, 12], [1, 2, 3, 4])


@pytest.mark.parametrize("name", reference.TOPOLOGIES)
def test_the_choice_is_at_least_as_good_as_the_layout_written_by_hand(name):
    run, kind = getattr(reference, name)(), parse(reference.TOPOLOGIES[name]).chip
    work = workload(run, run.mesh.num_devices)
    by_hand = judge(work, kind)
    # The layout by hand must be in the space, and fit whatever the chip: what is compared is the choice.
    roomy = dataclasses.replace(kind, usable=max(kind.usable, round(by_hand.memory.total)))
    space = Space(
        remat=(run.model.remat,), max_tensor=run.mesh.tensor, max_context=run.mesh.context, max_expert_tensor=1
    )
    assert run.mesh.sizes(work.devices) in [mesh.sizes(work.devices) for mesh in meshes(work, space)]
    found = best(work, roomy, lambda one: legal(run, one), space=space, top=1)[0]
    assert found.seconds <= by_hand.seconds
    assert next(iter(planned(run, found.work).problems()), None) is None
    assert "accumulation=" in describe(found.work)
