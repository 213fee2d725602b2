"""`launch.plan`: what is printed and written, exit statuses, mistakes; that the layout it names is one that trains."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from configs import debug
from launch import plan as command
from launch.cli import override
from launch.plan import main, split, topology_of
from moe.config import ConfigError, check
from moe.plan.chips import chip
from moe.train import aot

CONFIG = "configs/debug.py"
SPACE = ["--space.max-tensor", "2", "--space.max-context", "1", "--space.remat", "none", "full"]


def plan(capsys: Any, *words: str) -> tuple[int, str, str]:
    status = main([CONFIG, *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_best_layouts_are_printed_and_written(capsys, tmp_path):
    status, out, _ = plan(
        capsys, "--chips", "4", "--chip", "v5p", "--top", "2", *SPACE, "--json", str(tmp_path / "a.json"),
        "--mesh.fsdp", "4",
    )  # fmt: skip
    found = json.loads((tmp_path / "a.json").read_text())
    assert status == 0
    assert [row["name"] for row in found["plans"]] == ["1", "2", "config"]
    first, second, own = found["plans"]
    assert first["step_s"] <= second["step_s"] and first["step_s"] <= own["step_s"]
    assert own["layout"].startswith("fsdp=4")
    assert first["step_s"] == pytest.approx(sum(first["seconds"].values()))
    assert first["predicted_bytes"] == pytest.approx(sum(first["bytes"].values()))
    assert f"fastest: {first['flags']}" in out
    assert found["limit_bytes"] == chip("v5p").usable and found["changes"] == ["--mesh.fsdp", "4"]


def test_the_flags_it_names_make_a_config_that_is_accepted(capsys, tmp_path):
    path = tmp_path / "a.json"
    assert plan(capsys, "--chips", "4", "--chip", "v5p", "--top", "3", *SPACE, "--json", str(path))[0] == 0
    for row in json.loads(path.read_text())["plans"]:
        changed = override(debug.get_config(), row["flags"].split(), "test")
        check(changed)
        assert changed.mesh.num_devices == 4


def test_verified_layouts_show_what_the_compiler_says(capsys, monkeypatch, tmp_path):
    compiled = []

    def pretend(run: Any, devices: Any) -> Any:
        compiled.append((run.mesh, devices))
        memory = SimpleNamespace(peak=2_000_000, total=3_000_000)
        return SimpleNamespace(memory=memory, refused="", compile_s=1.0)

    monkeypatch.setattr(aot, "compile_step", pretend)
    monkeypatch.setattr("moe.plan.topology.devices", lambda topology: [str(topology)] * topology.num_devices)
    path = tmp_path / "a.json"
    words = ("--chips", "4", "--chip", "v5p", "--top", "2", "--verify", "1", "--json", str(path))
    status, out, _ = plan(capsys, *words, *SPACE)
    first, second = json.loads(path.read_text())["plans"][:2]
    assert status == 0 and "predicted" in "".join(out.split())
    assert [devices for _, devices in compiled] == [["v5p:2x2x1"] * 4]
    assert first["predicted_over_compiled"] == pytest.approx(first["predicted_bytes"] / 2e6)
    assert "compiled_bytes" not in second


def test_what_does_not_fit_is_exit_status_1_and_says_what_would(capsys):
    words = ("--model.vocab-size", str(2**34), "--space.max-tensor", "1", "--space.remat", "full")
    status, out, err = plan(capsys, "--chips", "1", "--chip", "v5e", "--batch-size", "8", *words)
    assert (status, out) == (1, "")
    assert err.startswith("error: 1 v5e with 8 sequences of 64: nothing fits. The leanest layout needs ")
    assert err.rstrip().endswith("16 times as many do not fit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chip", "v5p"], "chips"),
        (["--chips", "4", "--chip", "v99"], "chip = 'v99': must be one of v4, v5e"),
        (["--chips", "0", "--chip", "v5p"], "chips = 0: must be at least 1"),
        (["--chips", "4", "--chip", "v5p", "--verify", "9"], "verify = 9: must be at most top = 5"),
        (["--chips", "4", "--chip", "v5p", "--spare", "1"], "spare = 1.0: must be less than 1"),
        (
            ["--chips", "4", "--chip", "v5p", "--space.remat", "some"],
            "space.remat = ('some',): must hold remat policies",
        ),
        (
            ["--chips", "3", "--chip", "v5p", "--verify", "1"],
            "chips = 3: no slice of v5p has so many; the nearest have 4",
        ),
        (["--chips", "4", "--chip", "v5p", "--assume.efficiency", "2"], "assume.efficiency = 2.0: must be above 0"),
        (["--chips", "4", "--chip", "v5p", "--model.widht", "4"], "model.width"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([CONFIG, *words])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith("error: ") and message in said[0]


def test_its_own_flags_are_told_from_those_of_the_config():
    words = ["--chips", "4", "--model.width", "8", "--space.remat", "none", "full", "--top=3", "--seed", "1"]
    own, rest = split(words, ["chips", "space", "top"])
    assert own == ["--chips", "4", "--space.remat", "none", "full", "--top=3"]
    assert rest == ["--model.width", "8", "--seed", "1"]


def test_a_number_of_chips_is_the_slice_most_like_a_cube():
    assert [topology_of(chip("v5p"), n) for n in (4, 64, 512)] == ["v5p:2x2x1", "v5p:4x4x4", "v5p:8x8x8"]
    assert topology_of(chip("v5e"), 256) == "v5e:16x16"
    assert topology_of(chip("h200"), 16) == "h200:2x8"
    with pytest.raises(ConfigError, match="no slice of v6e"):
        topology_of(chip("v6e"), 5)


def test_help_names_the_flags(capsys):
    assert main(["--help"]) == 0
    assert "--verify" in capsys.readouterr().err
    assert command.main([]) == 2
