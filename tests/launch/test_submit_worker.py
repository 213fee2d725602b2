"""`launch.submit tpu-vm`: its scripts with stand-ins for gcloud, sudo and Python; the loop that restarts a worker."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.submit.base import Job, WriteFile
from launch.submit.tpu_vm import TpuVmConfig

JOB = Job(spec="configs/debug.py", workdir="/mnt/runs/a", words=("--steps", "100"))
CONFIG = TpuVmConfig(
    name="moe-a", accelerator_type="v6e-4", zone="europe-west4-a", project="p", share="10.0.0.2:/runs",
    env=("NOTE=two words",), secrets=("HF_TOKEN=hf",), poll_s=1,
)  # fmt: skip
GIT = {f"GIT_{who}_{what}": "a" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
PYTHON = """#!/bin/sh
case "$*" in *"uv venv"*) mkdir -p env/bin; cp "$0" env/bin/python ;; esac
echo "NOTE=$NOTE HF_TOKEN=$HF_TOKEN in $(basename "$PWD"): $*" >>"$SAID"
case "$*" in *worker*) exec sleep 60 ;; esac
"""


@dataclasses.dataclass
class Machine:
    """A home, a folder of stand-ins before everything else on the path, and what those said."""

    home: Path
    bin: Path
    said: Path

    def fake(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        path = {"PATH": f"{self.bin}:{os.environ['PATH']}", "SAID": str(self.said), "HOME": str(self.home)} | GIT
        # A script that never ends is a failure, and must not outlive the test.
        return subprocess.run(words, cwd=self.home, env=path, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    found = Machine(tmp_path / "home", tmp_path / "bin", tmp_path / "said")
    found.said.touch()
    for action in dataclasses.replace(CONFIG, folder=str(found.home)).actions(JOB):
        if isinstance(action, WriteFile):
            action.path.parent.mkdir(exist_ok=True)
            action.path.write_text(action.text)
    return found


def test_the_code_of_the_commit_is_packed_installed_and_started_once(machine):
    for name, text in (("python3", PYTHON), ("sudo", 'echo "sudo $*" >>"$SAID"'), ("mountpoint", "exit 1")):
        machine.fake(name, text)
    machine.fake("gcloud", 'echo "value of $*"')
    code = machine.home / JOB.spec
    code.parent.mkdir()
    code.write_text("first")
    assert machine.run("git", "init", "-q").returncode == 0
    assert machine.run("git", "commit", "-qm", "empty", "--allow-empty").returncode == 0
    refused = machine.run("sh", "moe-a/pack.sh")
    assert refused.returncode == 2 and f"'{JOB.spec}' did not match any file" in refused.stderr
    assert machine.run("git", "add", JOB.spec).returncode == 0
    assert machine.run("git", "commit", "-qm", "first").returncode == 0
    code.write_text("second")
    refused = machine.run("sh", "moe-a/pack.sh")
    assert (refused.returncode, refused.stderr) == (
        2, "error: uncommitted changes would stay behind: commit or stash them\n",
    )  # fmt: skip
    assert machine.run("git", "checkout", "-q", JOB.spec).returncode == 0
    assert machine.run("sh", "moe-a/pack.sh").returncode == 0
    shutil.copytree(machine.home / "moe-a", machine.home / "worker")  # what scp does
    installed = machine.run("sh", "worker/install.sh")
    assert installed.returncode == 0, installed.stderr
    assert (machine.home / "worker/code" / JOB.spec).read_text() == "first"
    assert machine.run("sh", "worker/start.sh").returncode == 0
    process = int((machine.home / "worker/run.pid").read_text())
    try:
        again = machine.run("sh", "worker/start.sh")
        assert again.returncode == 1 and "the run goes on already" in again.stderr
        for _ in range(600):
            if "worker --restarts" in machine.said.read_text():
                break
            time.sleep(0.05)
    finally:
        os.kill(process, signal.SIGTERM)  # as stop.sh has every worker do
    said = machine.said.read_text()
    assert "sudo mount -t nfs 10.0.0.2:/runs /mnt/runs" in said
    command = f"-m launch.submit.worker --restarts 5 --workdir /mnt/runs/a -- {' '.join(JOB.command)}"
    value = "value of secrets versions access latest --secret=hf --project=p"
    assert f"NOTE=two words HF_TOKEN={value} in code: {command}\n" in said
    written = [path for path in (machine.home / "worker").glob("*.*") if path.suffix != ".bundle"]
    assert len(written) > 6 and not any("value of" in path.read_text() for path in written)


@pytest.mark.parametrize("last, status", [("ACTIVE", 0), ("FAILED", 1), ("SUSPENDED", 1)])
def test_it_waits_until_the_tpus_are_there_or_never_will_be(machine, last, status):
    machine.fake("sleep", ":")
    machine.fake("gcloud", f'echo x >>"$SAID"; [ "$(wc -l <"$SAID")" -lt 3 ] && echo PROVISIONING || echo {last}')
    waited = machine.run("sh", "moe-a/wait.sh")
    assert waited.returncode == status
    assert waited.stdout.split() == ["moe-a:", "PROVISIONING", "moe-a:", "PROVISIONING", "moe-a:", last]


def test_a_failed_question_ends_the_wait(machine):
    machine.fake("gcloud", "echo 'ERROR: no such resource' >&2; exit 1")
    waited = machine.run("sh", "moe-a/wait.sh")
    assert waited.returncode == 1 and "no such resource" in waited.stderr


def worker(tmp_path: Path, code: str) -> list[str]:
    options = ["--workdir", str(tmp_path), "--restarts", "2", "--backoff-s", "0"]
    return [sys.executable, "-m", "launch.submit.worker", *options, "--", sys.executable, "-S", "-c", code]


@pytest.mark.parametrize(
    "ends, status, starts",
    [("75 75 75 1 0", 0, 5), ("1 1 1 0", 1, 3), ("1 74 0", 74, 2), ("2 0", 2, 1), ("76 3 0", 3, 2)],
)
def test_a_worker_starts_again_by_exit_status(tmp_path, ends, status, starts):
    left = tmp_path / "left"
    left.write_text(ends)
    code = f"""
import sys
with open({str(left)!r}, "r+") as file:
    first, *rest = file.read().split()
    file.seek(0)
    file.truncate()
    file.write(" ".join(rest))
sys.exit(int(first))
"""
    ended = subprocess.run(worker(tmp_path, code), check=False, capture_output=True, text=True)
    assert (ended.returncode, len(ends.split()) - len(left.read_text().split())) == (status, starts), ended.stderr


def test_a_worker_leaves_the_place_of_its_process_to_the_tpu(tmp_path):
    code = "import os, sys; sys.exit(3 if any(name.startswith('MOE_') for name in os.environ) else 0)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOE_")}
    assert subprocess.run(worker(tmp_path, code), check=False, env=environment).returncode == 0
