"""`launch.compile`: a real TPU compilation of a tiny step, what is printed and written, exit statuses, mistakes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import debug
from launch import compile_report
from launch.compile import QUIET, main, without_drops
from moe.config import check
from moe.dispatch.all_to_all import AllToAllConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.plan import topology

CONFIG = "configs/debug.py"
TINY = """--model.num-layers 1 --model.dense-layers 0 --model.mlp-hidden 0 --accumulation 1 --batch-size 4
--data.seq-len 16 --mesh.fsdp 4 --mesh.expert 2"""
WORDS = [CONFIG, "--topology", "v5e:2x2", *TINY.split()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(exit status, the JSON, the program's text, the compiled step) of one compilation for four v5e chips."""
    folder, kept = tmp_path_factory.mktemp("compiled"), []
    real = compile_report.compile_step

    def keep(*given: Any) -> Any:
        kept.append(real(*given))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_report, "compile_step", keep)
        status = main([*WORDS, "--json", str(folder / "a.json"), f"--hlo={folder / 'a.hlo'}"])
    return status, json.loads((folder / "a.json").read_text()), (folder / "a.hlo").read_text(), kept[0]


def test_a_tiny_step_fits_on_four_chips(found: Any) -> None:
    status, said, text, _ = found
    assert status == 0 and said["fits"] and said["refused"] == ""
    assert said["devices"] == 4 and said["mesh"]["fsdp"] == 4 and said["mesh"]["expert"] == 2
    # At the worst moment: not less than the state, not more than if nothing shared its place.
    kinds = [said["memory"][name] for name in compile_report.KINDS]
    assert 0 < said["memory"]["state"] < said["peak_bytes"] <= sum(kinds)
    assert said["limit_bytes"] == round(15.75 * 2**30)
    assert said["compiler_flops_per_device"] > 0 and said["hlo_bytes"] == len(text)
    assert "T(8,128)" in text  # the tiled layouts of a TPU


def test_nothing_is_out_of_place(found: Any) -> None:
    said = found[1]
    assert said["unexpected"] == said["misplaced"] == said["replicated"] == said["gathered"] == []
    assert said["loops_of_unknown_length"] == 0


def test_what_is_sent_is_summed_by_kind_and_axes(found: Any) -> None:
    rows = {(row["kind"], row["axes"]): row for row in found[1]["collectives"]}
    assert all(row["times"] > 0 and row["bytes"] > 0 and row["group"] > 1 for row in rows.values())
    gathered = rows["all-gather", "fsdp"]
    assert gathered["group"] == 4
    # At least the four attention matrices, 32 x (4 + 2 + 2 + 4) x 8, forward and backward, in bfloat16 or float32.
    assert gathered["bytes"] >= 2 * 32 * 12 * 8 * 2 * 3 / 4


def again(patch: pytest.MonkeyPatch, compiled: Any, words: list[str]) -> int:
    patch.setattr(compile_report, "compile_step", lambda *given: compiled)
    return main(words)


def test_a_step_that_is_too_large_ends_with_status_1(found: Any, monkeypatch: Any, capsys: Any) -> None:
    real = topology.parse("v5e:2x2")
    small = real._replace(chip=dataclasses.replace(real.chip, usable=found[1]["peak_bytes"] - 1))
    monkeypatch.setattr(topology, "parse", lambda name: small)
    assert again(monkeypatch, found[3], WORDS) == 1
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "temporaries" in said


def test_what_the_compiler_refuses_ends_with_status_1(found: Any, monkeypatch: Any, capsys: Any) -> None:
    refused = dataclasses.replace(found[3], refused="RESOURCE_EXHAUSTED: too large")
    assert again(monkeypatch, refused, WORDS) == 1
    assert "RESOURCE_EXHAUSTED: too large\nDOES NOT FIT" in capsys.readouterr().out


def test_the_tables_show_memory_collectives_and_time(found: Any, monkeypatch: Any, capsys: Any) -> None:
    assert again(monkeypatch, found[3], WORDS) == 0
    said = capsys.readouterr().out
    for part in ("v5e:2x2: 4 devices, fsdp 4 x expert 2", "4 sequences of 16 tokens, 64 in all", "state", "all-gather"):
        assert part in said
    assert said.splitlines()[-1].startswith("fits: 0.0")


def test_dropless_takes_the_budget_off_every_exchange() -> None:
    config = debug.get_config()
    assert without_drops(config) == config
    moe = config.model.moe
    assert moe is not None
    limited, free = (dataclasses.replace(moe, exchange=AllToAllConfig(budget=budget)) for budget in (1.5, None))
    attention = config.model.attention
    both = [
        DecoderConfig(stacks=(StackConfig(layers=(attention, part), repeats=2),), vocab_size=264)
        for part in (dataclasses.replace(limited, exchange=AllToAllConfig(budget=2.0, on_overflow="rerun")), free)
    ]
    for given, wanted in (
        (dataclasses.replace(config.model, moe=limited), dataclasses.replace(config.model, moe=free)),
        both,
    ):
        changed = without_drops(dataclasses.replace(config, model=given))
        assert changed == dataclasses.replace(config, model=wanted)
        check(changed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([CONFIG], "topology: --topology is missing"),
        ([CONFIG, "--topology"], "topology: --topology needs a value"),
        ([CONFIG, "--topology", "v5e:3x3"], "is no slice of v5e; the nearest are v5e:2x4"),
        ([CONFIG, "--topology", "v5e:2x2", "--mesh.fsdp", "3"], "must be divisible by"),
        ([CONFIG, "--topology", "v5e:2x2", "--mesh.fspd", "3"], "--mesh.fsdp"),
        ([CONFIG, "--topology", "v5e:2x2", "--batch-size", "16", "--mesh.fsdp", "8"], "multiply to the 4 devices"),
        (["configs/missing.py", "--topology", "v5e:2x2"], "there is no such file"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(words: list[str], said: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and said in shown and shown.startswith("error: ") and shown.count("\n") == 1


def test_without_a_config_the_usage_is_shown(capsys: Any) -> None:
    assert main([]) == 2 and "usage" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "--topology" in capsys.readouterr().err


def test_the_json_can_be_read_again(found: Any, tmp_path: Path) -> None:
    assert json.loads(json.dumps(found[1])) == found[1]


def test_an_ordinary_command_does_not_wake_the_compiler_of_tpus() -> None:
    code = (
        "import launch, jax, sys\n"
        "assert jax.devices()[0].platform == 'cpu'\n"
        "sys.exit('libtpu' in open('/proc/self/maps').read())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in (*QUIET, "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
