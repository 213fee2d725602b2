"""What `launch.submit tpu-vm` has every worker run, from a folder in its home that holds the code as a git bundle."""

import shlex
from typing import TYPE_CHECKING

from launch.submit.base import Job

if TYPE_CHECKING:
    from launch.submit.tpu_vm import TpuVmConfig


def scripts(config: "TpuVmConfig", job: Job) -> dict[str, str]:
    """File name -> text."""
    return {"install.sh": _install(config), "start.sh": _start(config), "run.sh": _run(config, job)}


def stop(name: str) -> str:
    """Asks the run to save and end; it is not started again."""
    return f'kill -TERM "$(cat {name}/run.pid)"'


def _head(what: str) -> str:
    return f'#!/bin/sh\n# Made by launch.submit tpu-vm: {what}\nset -eu\ncd "$(dirname "$0")"\n'


def _install(config: "TpuVmConfig") -> str:
    head = _head("the code of the commit, a Python and the packages, on a worker.")
    return f"""{head}rm -rf code env
git clone --quiet code.bundle code
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python {config.python} env
python3 -m uv pip install --quiet --python env/bin/python -e './code[tpu]'
sudo apt-get install -qq -y nfs-common
"""


def _start(config: "TpuVmConfig") -> str:
    mount, share = shlex.quote(config.mount), shlex.quote(config.share)
    head = _head("the run in the background, on a worker; its log is run.log.")
    return f"""{head}if [ -f run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then
  echo "error: the run goes on already, as process $(cat run.pid); stop.sh ends it" >&2
  exit 1
fi
mountpoint -q {mount} || {{ sudo mkdir -p {mount}; sudo mount -t nfs {share} {mount}; }}
nohup setsid sh run.sh >>run.log 2>&1 </dev/null &
echo $! >run.pid
"""


def _run(config: "TpuVmConfig", job: Job) -> str:
    head = _head("the job, started again by its exit status, on a worker.")
    lines = ["cd code", 'PATH="$(cd ../env/bin && pwd):$PATH"', "export PATH"]
    for word in config.env:
        name, value = word.split("=", 1)
        lines.append(f"export {name}={shlex.quote(value)}")
    for word in config.secrets:
        name, secret = word.split("=", 1)
        # The value is read here and is in the environment alone: in no command line, file or log.
        ask = f"gcloud secrets versions access latest --secret={secret} --project={config.project}"
        lines += [f'{name}="$({ask})"', f"export {name}"]
    supervised = ("--restarts", str(config.restarts), "--workdir", job.workdir)
    command = shlex.join(("python", "-m", "launch.submit.worker", *supervised, "--", *job.command))
    return head + "\n".join([*lines, f"exec {command}", ""])
