"""A router that is not in the tree: one class in somebody's own file trains, is evaluated and appears in the report."""

import json
import subprocess
import sys
from pathlib import Path

import moe
from tests.launch.runs import environment

ROUTER = '''
"""Every token goes to its best expert and to the one after it."""
import dataclasses
import jax, jax.numpy as jnp
from moe.routing.base import LinearRouterConfig
from moe.routing.choice import token_choice, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeighboursConfig(LinearRouterConfig):
    """The best expert and its neighbour."""

    def route(self, logits_BSE, context, bias_E):
        probs = jax.nn.softmax(logits_BSE, axis=-1)
        best, margin = top_k(probs + bias_E, 1)
        expert = (best + jnp.arange(2)) % probs.shape[-1]
        return token_choice(
            context, expert_BSK=expert, weight_BSK=jnp.take_along_axis(probs, expert, axis=-1), probs_BSE=probs,
            log_z_BS=jax.nn.logsumexp(logits_BSE, axis=-1), margin_BS=margin,
        )
'''
CONFIG = """
import dataclasses
from configs import debug
from neighbours import NeighboursConfig


def get_config():
    c = debug.folder()
    moe = dataclasses.replace(c.model.moe, router=NeighboursConfig())
    return dataclasses.replace(c, model=dataclasses.replace(c.model, moe=moe))
"""


def test_a_router_of_ones_own_trains_and_appears_in_the_report(text: Path, tmp_path: Path) -> None:
    (tmp_path / "neighbours.py").write_text(ROUTER)
    (tmp_path / "mine.py").write_text(CONFIG)
    words = ["--steps", "12", "--data.source.path", str(text), "--data.cache-dir", f"{text}-cache"]
    words += ["--data.validation-fraction", "0.2", "--model.moe.router.init-std", "0.1", "--workdir", "run"]
    root = str(Path(moe.__file__).parent.parent)

    def launch(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment(text) | {"PYTHONPATH": root},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    launch("launch.train", "mine.py", *words)
    report = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "neighbours:NeighboursConfig" in report
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 12 and all(value > 0 for value in records[-1]["balance/load_balance"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["mean_bits_per_byte"] < 8 and "load/max_violation/layer_1" in summary
    # Another process finds the class by the name in config.json.
    assert "mean" in launch("launch.evaluate", "--workdir", "run")
