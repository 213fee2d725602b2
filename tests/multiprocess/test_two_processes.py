"""The invariance grid over two processes: what `tests/test_invariance.py` says of devices, said of hosts.

Guards against the reductions that stay inside a process (Megatron #1652: z-loss rescaled by parallelism; MaxText:
signs from device-local counts; DeepSpeed #5618: expert gradients times the expert-parallel degree), and against rows
of a batch that land on the wrong host. One pair of processes answers every test: start-up and compilation are dear.
"""

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe.axes import MeshConfig
from moe.data import prepare
from moe.dispatch import DenseConfig
from tests import grid
from tests.grid import Cut, Measured, agree, measured
from tests.launch.runs import write_text
from tests.multiprocess import cuts, worker
from tests.multiprocess.together import finish, run_together

ORACLE = Cut(dispatch=DenseConfig())
Found = Callable[[str], Any]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("two") / "text")


@pytest.fixture(scope="module")
def found(text: Path) -> Found:
    """What the pair has found under a name; both processes must have found the same."""
    folder = text.parent
    run_together("tests.multiprocess.worker", cuts.PROCESSES, cuts.DEVICES, folder, [str(text)])

    def read(name: str) -> Any:
        answers = [pickle.loads((folder / f"{name}.{index}").read_bytes()) for index in range(cuts.PROCESSES)]
        if isinstance(answers[0], Measured):
            jax.tree.map(np.testing.assert_array_equal, vars(answers[0]), vars(answers[1]))
        return answers[0] if isinstance(answers[0], Measured) else answers

    return read


def same_step(here: Measured, oracle: Measured) -> None:
    """`agree`, for the losses and gradients that were taken here; and every rule's term."""
    taken = {name: oracle.values[name] for name in here.values}
    agree(here, dataclasses.replace(oracle, values=taken, gradients={name: oracle.gradients[name] for name in taken}))
    assert here.terms.keys() == oracle.terms.keys()
    for name in oracle.terms.keys() - set(grid.DEPENDS_ON_ACCUMULATION):
        grid.close(here.terms[name], oracle.terms[name], f"term {name}")


@pytest.mark.parametrize("cut", cuts.CUTS, ids=str)
def test_two_processes_compute_the_step_of_one_device(found: Found, cut: Cut) -> None:
    here = found(str(cut))
    same_step(here, measured(ORACLE))
    if cut.padding != "sequences":  # added sequences change which micro-batch a sequence is in
        same = measured(Cut(accumulation=cut.accumulation))
        for name in grid.DEPENDS_ON_ACCUMULATION:
            grid.close(here.terms[name], same.terms[name], f"term {name}")
            if name in here.values:
                grid.close_trees(here.gradients[name], same.gradients[name], f"gradient {name}")


def test_a_noisy_router_draws_the_same_numbers_in_two_processes(found: Found) -> None:
    noisy, plain = measured(Cut(router=cuts.NOISY_ROUTER)), measured(ORACLE)
    assert (noisy.count_LGE != plain.count_LGE).any()
    same_step(found("noisy"), noisy)


def test_the_gradient_of_every_term_is_taken_in_two_processes() -> None:
    assert {name for names in cuts.ALONE for name in names} == {grid.LM, *grid.TERMS}


def test_the_processes_and_their_micro_batches_have_unequal_numbers_of_real_tokens(found: Found) -> None:
    tokens_AG = found(str(Cut(mesh=cuts.DATA, accumulation=2, remat="full"))).tokens_G.reshape(2, -1)
    of_process = tokens_AG.reshape(2, cuts.PROCESSES, -1).sum(axis=2)
    assert len(set(of_process.ravel().tolist())) == 4


@pytest.mark.parametrize("layout", cuts.LAYOUTS)
def test_the_rows_of_both_processes_make_the_global_batch(found: Found, text: Path, layout: str) -> None:
    loader = worker.load(prepare(cuts.data_config(text)), range(cuts.BATCH))
    expected = [next(loader) for _ in range(cuts.STEPS)]
    loader.close()
    answers = [answer[layout] for answer in found("text")]
    rows = [rows for rows, _ in answers]
    halves = [list(range(8)), list(range(8, 16))]
    other = {"interleaved": [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]], "tensor 8": [[*range(16)]] * 2}
    assert rows == other.get(layout, halves)
    for _, batches in answers:
        for batch, wanted in zip(batches, expected, strict=True):
            assert batch.keys() == wanted.keys()
            for name, value in wanted.items():
                np.testing.assert_array_equal(batch[name], value, name)


def test_train_steps_on_text_are_those_of_one_device(found: Found, text: Path) -> None:
    expected = worker.steps(text, MeshConfig(data=1), 1)
    for answer in found("steps"):
        for mine, wanted in zip(answer["metrics"], expected["metrics"], strict=True):
            assert mine.keys() == wanted.keys()
            for name, value in wanted.items():
                grid.close(mine[name], value, name, 1e-4)
        grid.close_trees(answer["params"], expected["params"], "parameters", 1e-4)


# The guard itself: a pair that goes wrong must end, both of it, and say so.


def sleeper(seconds: float, status: int = 0) -> "subprocess.Popen[bytes]":
    words = f"import sys, time; time.sleep({seconds}); sys.exit({status})"
    return subprocess.Popen([sys.executable, "-c", words])


def test_when_one_process_fails_the_other_is_ended() -> None:
    pair = [sleeper(60), sleeper(0, 3)]
    with pytest.raises(RuntimeError, match=r"\[None, 3\]"):
        finish(pair, 60)
    assert all(process.returncode is not None for process in pair)


def test_a_pair_that_hangs_is_ended_when_time_is_up() -> None:
    pair = [sleeper(60), sleeper(60)]
    with pytest.raises(TimeoutError, match="not done"):
        finish(pair, 0.2)
    assert all(process.returncode is not None for process in pair)
