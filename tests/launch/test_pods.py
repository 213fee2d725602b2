"""The table of published models on their pods, from numbers made here; what compiles is tested in test_compile.py."""

import json
import re
from pathlib import Path

import pytest

from configs import reference
from launch import pods
from moe.config import fingerprint
from moe.plan import topology

SENT = [{"kind": "all-to-all", "axes": "expert", "group": 16, "times": 2, "bytes": 3_000_000_000}]
SENT += [{"kind": "all-reduce", "axes": "fsdp", "group": 64, "times": 2, "bytes": 500_000_000}]


def numbers(name: str, **changes: object) -> dict[str, object]:
    config = getattr(reference, name)()
    asked = topology.parse(reference.TOPOLOGIES[name])
    return {
        "fits": True, "fingerprint": fingerprint(config), "topology": str(asked), "collectives": SENT,
        "mesh": config.mesh.sizes(asked.num_devices), "memory": {"state": 3 << 30}, "peak_bytes": 4 << 30,
        "limit_bytes": 16 << 30, "best_step_s": 2.5, "lower_s": 1.0, "compile_s": 60.0,
        "misplaced": [], "gathered": [], "unexpected": [],
    } | changes  # fmt: skip


def page(folder: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> tuple[int, str]:
    (folder / "olmoe_1b_7b.json").write_text(json.dumps(numbers("olmoe_1b_7b", **changes)))
    words = ["--workdir", str(folder), "--only", "olmoe_1b_7b", "--page", str(folder / "page.md")]
    status = pods.main(words)
    assert capsys.readouterr().out.strip() == (folder / "page.md").read_text().strip()
    return status, (folder / "page.md").read_text()


def test_a_row_holds_compiled_and_predicted_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = page(tmp_path, capsys)
    (row,) = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    head = next(line for line in text.splitlines() if line.startswith("| model"))
    assert status == 0 and len(cells) == len(head.strip("|").split("|"))
    assert cells[:7] == ["`olmoe_1b_7b`", "6.9B, 1.3B", "v5e:8x8", "fsdp 64 expert 16", "8", "3.00", "4.00"]
    assert cells[8:10] == ["25%", "2.50"] and cells[11:] == ["3.0", "0.5", "61"]


@pytest.mark.parametrize("what", pods.LAID_OUT)
def test_what_does_not_lie_as_the_table_says_is_named_and_fails(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = page(tmp_path, capsys, **{what: ["a tensor somewhere"]})
    assert status == 1 and "- olmoe_1b_7b: a tensor somewhere" in text


def test_a_model_that_does_not_fit_is_named_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = page(tmp_path, capsys, fits=False)
    assert status == 1 and "Does not fit, or did not compile: olmoe_1b_7b" in text


def test_an_unknown_model_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pods.main(["--only", "gpt"])
    assert stop.value.code == 2 and "only = 'gpt': there are paper_3b, " in capsys.readouterr().err


def test_the_docstrings_of_the_models_say_what_the_committed_table_says() -> None:
    text = (Path(reference.__file__).parent.parent / "docs" / "results" / "pods.md").read_text()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(reference.TOPOLOGIES)
    for name, _, pod, _, _, _, compiled, predicted, _, _, seconds, *_ in rows:
        said = f"On {pod}: {compiled} GiB a device as compiled, {predicted.split()[0]} predicted; a step of {seconds} s"
        assert said in " ".join((getattr(reference, name.strip("`")).__doc__ or "").split()), name


def test_the_planner_is_within_ten_percent_of_the_compiler_in_the_committed_table() -> None:
    text = (Path(reference.__file__).parent.parent / "docs" / "results" / "pods.md").read_text()
    off = [float(cell) for cell in re.findall(r"\(([+-][\d.]+)%\)", text)]
    assert len(off) == len(reference.TOPOLOGIES) and max(map(abs, off)) < 10
