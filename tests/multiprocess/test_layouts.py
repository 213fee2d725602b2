"""Layouts over two and four processes: experts, positions and stages that lie across hosts."""

import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import layouts
from tests.multiprocess.layout_worker import LAYOUTS
from tests.multiprocess.together import run_together


@pytest.mark.parametrize("processes", LAYOUTS)
def test_the_step_of_several_processes_is_that_of_one_device(processes: int, tmp_path: Path) -> None:
    run_together("tests.multiprocess.layout_worker", processes, layouts.DEVICES, tmp_path, [str(processes)])
    answers = [pickle.loads((tmp_path / str(index)).read_bytes()) for index in range(processes)]
    for answer in answers[1:]:
        jax.tree.map(np.testing.assert_array_equal, answer, answers[0])
    for layout, found in zip(LAYOUTS[processes], answers[0], strict=True):
        try:
            layouts.same(found, layouts.oracle())
        except AssertionError as error:
            raise AssertionError(f"{layout}: {error}") from None
