"""Launches that cannot work: one clear message and a status other than 0, soon, on every process."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import several
from tests.launch.runs import command, run, write_text
from tests.multiprocess.together import free_port

LIMIT_S = 30
CONFIG = str(several.ROOT / "configs" / "debug.py") + ":folder"
QUICK = ("--cluster.start-timeout-s", "15", "--cluster.agree-timeout-s", "15", "--batch-size", "16")
SOON = ("--cluster.start-timeout-s", "3")


@dataclasses.dataclass
class Launch:
    """One process of a launch."""

    words: list[str]
    place: dict[str, str]
    cwd: Path = several.ROOT
    devices: int = 1
    module: str = "launch.train"


@dataclasses.dataclass
class World:
    """Where a bad launch happens: text that may be read, a workdir that may be made, and a port."""

    folder: Path
    text: Path
    port: int

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    def words(self, *more: str, workdir: Path | str | None = None, path: Path | str | None = None) -> list[str]:
        found = command(self.text, Path(workdir or self.workdir), *QUICK, *more)[3:]
        found[0] = CONFIG
        found[found.index(str(self.text))] = str(path or self.text)
        return found

    def two(self, first: list[str], second: list[str] | None = None, of: tuple[int, int] = (2, 2)) -> list[Launch]:
        pairs = zip((first, second if second is not None else first), of, strict=True)
        return [Launch(words, several.place(index, n, self.port)) for index, (words, n) in enumerate(pairs)]


Case = Callable[[World], tuple[list[Launch], int, str]]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    """A bad launch: its processes, the status and the message that each must end with."""
    CASES[make.__name__] = make
    return make


@case
def another_number_of_processes(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words(), of=(2, 3)), 2, r"num_processes: 2 on process 0 \(host .*, and 3 on process 1"


@case
def a_host_that_does_not_come(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words(*SOON))[:1], 1, r"process 1 of 2 did not come within 3 s \(cluster.start_timeout_s\)"


@case
def a_first_host_that_does_not_come(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words(*SOON))[1:], 1, r"process 0 of 2 did not answer at 127.0.0.1:\d+ within 3 s"


@case
def a_process_id_twice(w: World) -> tuple[list[Launch], int, str]:
    launches = [Launch(w.words(), several.place(index, 3, w.port)) for index in (0, 1, 1)]
    return launches, 2, "process_id = 1: is on host .* and on host"


@case
def a_process_id_beyond_the_last(w: World) -> tuple[list[Launch], int, str]:
    return [Launch(w.words(), several.place(2, 2, w.port))], 2, r"process_id = 2, from MOE_\*: must be from 0 to .* = 1"


@case
def half_of_a_place(w: World) -> tuple[list[Launch], int, str]:
    return [Launch(w.words(), {"MOE_COORDINATOR": "a:1"})], 2, "MOE_NUM_PROCESSES is missing"


@case
def a_config_that_differs(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words(), w.words("--seed", "1")), 2, "differ in config seed: 0 on process 0 .*, 1 on process 1"


@case
def an_environment_that_differs(w: World) -> tuple[list[Launch], int, str]:
    launches = w.two(w.words())
    launches[1].place["XLA_FLAGS"] = "--xla_cpu_enable_fast_math=true"
    return launches, 2, "differ in variable XLA_FLAGS: .* on process 0 .* on process 1"


@case
def devices_that_differ(w: World) -> tuple[list[Launch], int, str]:
    launches = w.two(w.words())
    launches[1].devices = 2
    return launches, 2, r"differ in devices: 1 x cpu on process 0 \(host .*, 2 x cpu on process 1"


@case
def data_that_differ(w: World) -> tuple[list[Launch], int, str]:
    launches = w.two(w.words("--data.cache-dir", "cache", path="text"))
    for index, launch in enumerate(launches):
        launch.cwd = w.folder / f"host{index}"
        write_text(launch.cwd / "text")
        (launch.cwd / "text" / "colours" / f"{index}.txt").write_text("orange " * 2000)
    return launches, 2, "differ in data fingerprint: [0-9a-f]+ on process 0 .*, [0-9a-f]+ on process 1"


@case
def data_that_one_host_lacks(w: World) -> tuple[list[Launch], int, str]:
    launches = w.two(w.words("--data.cache-dir", "cache", path="text"))
    for index, launch in enumerate(launches):
        launch.cwd = w.folder / f"host{index}"
        launch.cwd.mkdir()
    write_text(w.folder / "host0" / "text")
    return launches, 2, r"process 1 \(host .*\): data.source.path = 'text'"


@case
def a_workdir_that_is_not_shared(w: World) -> tuple[list[Launch], int, str]:
    launches = w.two(w.words(workdir="run"))
    for index, launch in enumerate(launches):
        launch.cwd = w.folder / f"host{index}"
        launch.cwd.mkdir()
    return launches, 2, r"process 1 \(host .*\): workdir = 'run': this host does not see .* process 0 wrote"


@case
def a_workdir_that_cannot_be_written(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words(workdir="/proc/moe/run")), 2, "workdir = '/proc/moe/run': cannot be written"


@case
def a_workdir_that_is_a_file(w: World) -> tuple[list[Launch], int, str]:
    w.workdir.write_text("")
    return w.two(w.words()), 2, "workdir = '.*run': is a file"


@case
def a_workdir_that_is_something_else(w: World) -> tuple[list[Launch], int, str]:
    w.workdir.mkdir()
    (w.workdir / "thesis.tex").write_text("")
    return w.two(w.words()), 2, "workdir = '.*run': is not empty and is not the folder of a run"


@case
def a_mistake_on_one_host(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words(), w.words("--steps", "0")), 2, r"process 1 \(host .*\): steps = 0: must be at least 1"


@case
def an_unknown_field(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words("--model.moe.experts", "4")), 2, "--model.moe.experts"


@case
def a_mesh_that_does_not_fit(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words("--mesh.fsdp", "4")), 2, "mesh"


@case
def a_batch_that_cannot_be_cut(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words("--batch-size", "10")), 2, "batch_size = 10: .* must be divisible by"


@case
def parameters_that_are_not_there(w: World) -> tuple[list[Launch], int, str]:
    return w.two(w.words("--init-from", str(w.folder / "none"))), 2, "workdir = '.*none': holds no config.json"


@case
def an_unknown_backend(w: World) -> tuple[list[Launch], int, str]:
    return [Launch(["cloud", CONFIG], {}, module="launch.submit")], 2, "cloud.*local.*slurm.*gke.*tpu-vm"


@case
def a_scheduler_that_is_not_there(w: World) -> tuple[list[Launch], int, str]:
    words = ["slurm", *w.words()]
    return [Launch(words, {"PATH": "/nowhere"}, module="launch.submit")], 2, "sbatch"


@pytest.mark.parametrize("name", CASES)
def test_every_process_says_why_and_ends(name: str, text: Path, tmp_path: Path) -> None:
    launches, status, said = CASES[name](World(tmp_path, text, free_port()))
    ends = several.finish(
        [several.start([one.module, *one.words], one.place, text, one.devices, one.cwd) for one in launches],
        2 * LIMIT_S,
    )
    for end in ends:
        assert end.status == status, end.said
        errors = [line for line in end.said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and re.search(said, errors[0]), end.said
        assert "Traceback" not in end.said
        assert end.seconds < LIMIT_S
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_there_are_twenty_of_them() -> None:
    assert len(CASES) >= 20


def test_a_checkpoint_of_another_model(text: Path, tmp_path: Path) -> None:
    """Its parameters have other shapes: a mistake of the launch, not damage, so that nothing is moved or skipped."""
    w = World(tmp_path, text, free_port())
    short = (
        "--steps", "6", "--checkpoint.every", "6", "--batch-size", "16", "--checkpoint.keep-best", "0",
        "--evaluate.every", "0",
    )  # fmt: skip
    run(text, w.workdir, *short, "--model.width", "64")
    config = w.workdir / "config.json"
    config.write_text(config.read_text().replace('"width": 64', '"width": 32'))
    before = sorted(w.workdir.rglob("*"))
    launches = w.two(command(text, w.workdir, *short, "--cluster.start-timeout-s", "20")[3:])
    ends = several.finish([several.start([one.module, *one.words], one.place, text, 1) for one in launches], 60)
    for end in ends:
        assert end.status == 2, end.said
        (error,) = [line for line in end.said.splitlines() if line.startswith("error: ")]
        assert "embedding is float32[264, 32] by the config, the checkpoint holds float32[264, 64]" in error
    assert [path for path in before if not path.exists()] == []


def test_a_port_that_is_taken(text: Path, tmp_path: Path) -> None:
    """Process 0 says so; the others cannot know more than that something else answers."""
    import socket

    with socket.create_server(("", 0)) as taken:
        w = World(tmp_path, text, taken.getsockname()[1])
        launches = w.two(w.words(*SOON))
        ends = several.finish([several.start([one.module, *one.words], one.place, text, 1) for one in launches], 60)
    assert "cannot listen there (Address already in use" in ends[0].said and ends[0].status == 2
    assert ends[1].status == 1 and f"127.0.0.1:{w.port}" in ends[1].said
