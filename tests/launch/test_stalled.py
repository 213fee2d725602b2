"""A run whose input pipeline hangs is ended by the watchdog, with the status that starts it again, and says where."""

from pathlib import Path

from moe.train import events
from moe.train.events import read_events
from tests.launch.runs import run

CONFIG = """
import threading
from configs import debug
from moe.data import loader

def get_config():
    real = loader._Steps.__getitem__

    def hanging(self, step):
        if step == 4:
            threading.Event().wait()
        return real(self, step)

    loader._Steps.__getitem__ = hanging
    return debug.folder()
"""


def test_a_stalled_input_pipeline_ends_the_process_with_76(text: Path, tmp_path: Path) -> None:
    (tmp_path / "stalls.py").write_text(CONFIG)
    limits = ("--watchdog.report-after-s", "3", "--watchdog.stop-after-s", "8")
    said = run(text, tmp_path / "run", *limits, config=str(tmp_path / "stalls.py"), status=76)
    assert "stalled: waiting for the batch of step 5 for 3 s" in said and "in hanging" in said
    assert "for 8 s; the process ends (watchdog.stop_after_s = 8)" in said
    *_, last = read_events(tmp_path / "run")
    assert (last["event"], last["doing"]) == (events.STALLED, "waiting for the batch of step 5")
