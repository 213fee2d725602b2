"""The ladder of capacities: when it climbs, when it comes down, and that a resumed run does the same."""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from moe.config import ConfigError, check, save
from moe.dispatch import CapacityConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.train.ladder import Ladder, LadderConfig
from moe.train.load import CONFIG_NAME
from moe.train.run import RunConfig
from moe.train.workdir import check_workdir

CONFIG = LadderConfig(rungs=(1.0, 1.5, 2.0, 4.0), headroom=1.1, dwell=3)


def climb(needs: Iterable[float], ladder: Ladder | None = None, first: int = 1) -> list[float]:
    """The capacity of every step, as the training loop asks: a step's need is known after the next one started."""
    ladder = ladder or Ladder(CONFIG)
    found, before = [], None
    for step, need in enumerate(needs, first):
        found.append(ladder.capacity(step))
        if before is not None:
            ladder.observe(*before)
        before = (step, need)
    return found


def test_it_starts_on_the_last_rung_and_comes_down_after_the_dwell_to_the_highest_that_was_enough() -> None:
    # 1.1 * 1.2 = 1.32 needs 1.5; 1.1 * 1.5 = 1.65 needs 2. Three steps seen by step 5.
    assert climb([1.2, 1.5, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2]) == [4, 4, 4, 4, 2, 2, 2, 1.5]


def test_it_climbs_two_steps_after_the_need_and_at_once_as_far_as_it_must() -> None:
    down = [1.2] * 8
    assert climb([*down, 3.0, 1.2, 1.2, 1.2]) == [4, 4, 4, 4, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 4, 4]


def test_a_need_beyond_the_last_rung_stays_on_the_last() -> None:
    assert set(climb([9.0] * 8)) == {4}


def test_a_need_that_swings_about_a_border_changes_the_capacity_once() -> None:
    found = climb([1.3, 1.4] * 20)  # 1.43 and 1.54 about the rung at 1.5
    assert [a for a, b in itertools.pairwise(found) if a != b] == [4]
    assert found[-1] == 2


def test_what_interrupts_the_dwell_starts_it_anew() -> None:
    assert set(climb([1.2, 1.2, 4.0] * 5)) == {4}


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_run_cut_off_anywhere_goes_on_with_the_same_capacities(cut: int) -> None:
    needs = [1.2, 1.5, 1.2, 1.2, 3.0, 1.2, 1.2, 1.3, 0.8, 0.8, 0.8, 0.8, 2.5, 1.0, 1.0, 1.0, 1.0]
    whole, ladder = climb(needs), Ladder(CONFIG)
    before = climb(needs[:cut], ladder)
    ladder.observe(cut, needs[cut - 1])  # a save reads the last step's metrics first
    after = Ladder(CONFIG)
    after.set_state(json.loads(json.dumps(ladder.get_state())))
    assert before + climb(needs[cut:], after, cut + 1) == whole


@pytest.mark.parametrize(
    "other",
    [
        LadderConfig(rungs=(1.0, 4.0), headroom=1.1, dwell=3),
        dataclasses.replace(CONFIG, rungs=(1.0, 1.5, 2.0, 8.0)),  # as many rungs
        dataclasses.replace(CONFIG, headroom=2.0),
        dataclasses.replace(CONFIG, dwell=1),
    ],
)
def test_the_state_of_another_ladder_is_refused(other: LadderConfig) -> None:
    ladder, after = Ladder(CONFIG), Ladder(other)
    climb([1.2] * 4, ladder)
    state = json.loads(json.dumps(ladder.get_state()))
    before = after.get_state()
    said = (
        r"^ladder = .*: the checkpoint was saved on another one \(rungs = \[1\.0, 1\.5, 2\.0, 4\.0\], headroom = 1\.1"
    )
    with pytest.raises(ConfigError, match=said):
        after.set_state(state)
    assert after.get_state() == before


def test_a_state_that_does_not_say_its_ladder_is_of_this_one() -> None:
    ladder, after = Ladder(CONFIG), Ladder(CONFIG)
    climb([1.2] * 4, ladder)
    after.set_state({name: value for name, value in ladder.get_state().items() if name != "config"})
    assert after.get_state() == ladder.get_state()


def test_a_workdir_keeps_its_ladder(tmp_path: Path) -> None:
    model = DecoderConfig(moe=MoEConfig(dispatch=CapacityConfig()))
    config = RunConfig(model=model, ladder=CONFIG)
    save(config, tmp_path / CONFIG_NAME)
    check_workdir(tmp_path, config)
    for ladder in (None, dataclasses.replace(CONFIG, rungs=(1.0, 2.0))):
        with pytest.raises(ConfigError, match=r"holds a run with another config; .*ladder"):
            check_workdir(tmp_path, dataclasses.replace(config, ladder=ladder))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LadderConfig(rungs=(1.0,)), "rungs = .*at least two positive numbers, rising"),
        (LadderConfig(rungs=(2.0, 1.0)), "rungs"),
        (LadderConfig(rungs=(1.0, 1.0)), "rungs"),
        (LadderConfig(rungs=(0.0, 1.0)), "rungs"),
        (LadderConfig(headroom=0.9), "headroom = 0.9: must be at least 1"),
        (LadderConfig(dwell=0), "dwell = 0: must be at least 1"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused(config: LadderConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(config)
