"""What was saved comes back bit for bit, or is named and the one before is taken."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe.config import ConfigError
from moe.train.checkpoint import Checkpoints
from moe.train.failures import Damaged
from moe.train.run import CheckpointConfig
from moe.train.saved import restore_parts
from moe.train.state import TrainState
from tests.train.small_state import make, mesh_of, placed, shardings

# After the first read that fails Orbax closes its event loop; tensorstore's other answers find it closed and say so.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

WHERE = shardings(mesh_of(jax.devices()[:2]))
OLD, NEW = 3, 6


def equal(here: TrainState, there: TrainState) -> None:
    plain = lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), here, there)


def data(step: int) -> dict[str, Any]:
    return {"next_step": step, "order": [3, 1, 2], "part": 0.1}


def save(workdir: Path, *steps: int) -> None:
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    for step in steps:
        checkpoints.save(step, placed(step, WHERE), data(step), 2.5 - step / 10)
    checkpoints.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    save(workdir, OLD, NEW)
    return workdir


@pytest.fixture
def workdir(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def newest(workdir: Path) -> Path:
    return workdir / "checkpoints" / str(NEW)


def restored(workdir: Path) -> tuple[int, dict[int, str]]:
    """(step, what was skipped), once the state is known to be that of the step; then the newest is saved again."""
    skipped: dict[int, str] = {}
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    found = checkpoints.restore_newest(make, WHERE, skipped.__setitem__)
    assert found is not None and found.data == data(found.step)
    equal(found.state, placed(found.step, WHERE))
    assert jax.tree.map(lambda leaf: leaf.sharding, found.state) == WHERE
    if found.step != NEW:
        checkpoints.save(NEW, placed(NEW, WHERE), data(NEW), 1.0)
    checkpoints.close()
    return found.step, skipped


def test_the_newest_comes_back_with_its_data_and_nothing_is_moved(workdir: Path) -> None:
    assert restored(workdir) == (NEW, {})
    assert not (workdir / "damaged").exists()


def test_with_nothing_saved_there_is_nothing_to_restore(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, CheckpointConfig()).restore_newest(make, WHERE) is None


# Damage, each with the words that name the leaf or the file.


def another_state(folder: Path) -> None:
    """A whole, readable state that is not what was saved: here that of an earlier step."""
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / str(OLD) / "state", folder / "state")


def flipped_step(folder: Path) -> None:
    path = folder / "data" / "metadata"
    text = path.read_text()
    assert f'"next_step": {NEW}' in text
    path.write_text(text.replace(f'"next_step": {NEW}', '"next_step": 7'))


def flipped_data(folder: Path) -> None:
    """One bit in the middle of the largest file."""
    path = max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(bytes(raw))


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another state": (another_state, r"leaf params.scale and 6 more differ from what was saved"),
    "position": (flipped_step, r"data/metadata differs from what was saved"),
    "bit of a leaf": (flipped_data, r"params\.w|opt_state\.0\.w"),
    "half a position": (cut("data/metadata"), r"data/metadata is not readable"),
    "half a manifest": (cut("state/manifest.ocdbt"), r"manifest.ocdbt"),
    "half a structure": (cut("state/_METADATA"), r"JSONDecodeError"),
    "half a metric": (cut("metrics/metrics"), r"metrics/metrics is not readable"),
    "other metric": (lambda folder: (folder / "metrics" / "metrics").write_text('{"bits_per_byte": 0.5}'), r"says 0.5"),
    "no state": (lambda folder: shutil.rmtree(folder / "state"), r"state"),
    "no position": (lambda folder: shutil.rmtree(folder / "data"), r"data/metadata"),
    "nothing": (emptied, r"data/metadata"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_moved_away_and_the_one_before_is_taken(
    damage: str, workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, named = DAMAGE[damage]
    change(newest(workdir))
    with caplog.at_level(logging.WARNING):
        step, skipped = restored(workdir)
    assert step == OLD and list(skipped) == [NEW]
    assert re.search(named, skipped[NEW]), skipped[NEW]
    assert skipped[NEW] in caplog.text and "checkpoint 6 was moved to" in caplog.text
    assert [path.name for path in (workdir / "damaged").iterdir()] == [f"{NEW}-1"]
    assert restored(workdir) == (NEW, {})  # its step could be saved again


def test_with_no_good_one_left_all_are_named_and_all_stay(workdir: Path) -> None:
    flipped_step(newest(workdir))
    shutil.rmtree(workdir / "checkpoints" / str(OLD) / "state")
    for _ in range(2):  # the same command again must not begin at step 0
        with pytest.raises(Damaged, match=r"(?s)checkpoint 6: data/metadata differs.*checkpoint 3: "):
            Checkpoints(workdir, CheckpointConfig()).restore_newest(make, WHERE)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    assert not (workdir / "damaged").exists()


def test_a_run_that_goes_back_twice_saves_the_damaged_step_again(workdir: Path) -> None:
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    for step in (NEW, OLD):
        found = checkpoints.restore_newest(make, WHERE)
        assert found is not None and found.step == step
        if step == NEW:
            flipped_step(newest(workdir))
    checkpoints.save(NEW, placed(NEW, WHERE), data(NEW), 1.0)
    found = checkpoints.restore_newest(make, WHERE)
    assert found is not None and found.step == NEW
    checkpoints.close()


def test_what_a_killed_save_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    assert checkpoints.restore_newest(make, WHERE) is None
    checkpoints.save(3, placed(3, WHERE), data(3), None)
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_an_older_one_with_an_unreadable_metric_does_not_stop_the_run(workdir: Path) -> None:
    cut("metrics/metrics")(workdir / "checkpoints" / str(OLD))
    assert restored(workdir) == (NEW, {})
    assert [path.name for path in (workdir / "damaged").iterdir()] == [f"{OLD}-1"]


def test_one_saved_before_there_were_checksums_is_restored_and_said_to_be_unverified(
    workdir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (newest(workdir) / "data" / "metadata").write_text(json.dumps(data(NEW)))
    with caplog.at_level(logging.WARNING):
        assert restored(workdir) == (NEW, {})
    assert "checkpoint 6 was saved without checksums" in caplog.text


def test_a_checkpoint_of_another_model_is_a_mistake_and_stays(workdir: Path) -> None:
    def other() -> TrainState:
        state = make()
        return dataclasses.replace(state, params=state.params | {"w": state.params["w"][:, :7]})

    with pytest.raises(ConfigError, match=r"params\.w is float32\[64, 7\] by the config, the checkpoint holds"):
        Checkpoints(workdir, CheckpointConfig()).restore_newest(other, WHERE)
    assert not (workdir / "damaged").exists()


def abstract() -> dict[str, Any]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
    return {"params": jax.tree.map(one, jax.eval_shape(make).params)}


def test_parts_of_a_state_are_verified_too(workdir: Path) -> None:
    found = restore_parts(workdir, NEW, abstract())
    np.testing.assert_array_equal(found["params"]["w"], placed(NEW, WHERE).params["w"])
    another_state(newest(workdir))
    with pytest.raises(Damaged, match=r"checkpoint 6: leaf params\.scale and 1 more differ"):
        restore_parts(workdir, NEW, abstract())
    with pytest.raises(ConfigError, match=r"step = 4: .* holds the checkpoints of 3, 6"):
        restore_parts(workdir, 4, abstract())
