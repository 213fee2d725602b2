"""The page about a campaign: a table over the kinds, what the numbers mean, and what fell short."""

import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.faults.kinds import KINDS, MAX_SKIPPED
from tests.faults.tiny import EVERY, HEARTBEAT_S, STEPS
from tests.faults.verdicts import Fault

_HEAD = (
    "| fault | injected | survived | steps lost, median | at most | allowed | seconds to recover | what the log says |"
)
_LONGEST = 150


def write_page(path: Path, faults: Sequence[Fault], skipped: dict[str, str], command: str, root: Path) -> None:
    """Writes it from the records of the faults alone."""
    failed = [fault for fault in faults if fault.problems]
    lines = ["# Faults on purpose", "", _about(command), ""]
    lines += [f"{len(faults)} faults were injected, {len(faults) - len(failed)} survived as documented.", ""]
    lines += [_HEAD, "|---|---:|---:|---:|---:|---:|---:|---|"]
    for name in KINDS:
        if of_kind := [fault for fault in faults if fault.kind == name]:
            lines.append(_row(name, of_kind, root))
    lines += ["", *_rules(), "", *_details(faults)]
    lines += [f"Left out: {KINDS[name].what} ({why})." for name, why in skipped.items()]
    lines += ["", "## What fell short", ""]
    lines += [
        f"- {fault.kind}, {_plain(fault.target, root)}: {_plain('; '.join(fault.problems), root)}" for fault in failed
    ]
    lines += [] if failed else ["Nothing."]
    path.write_text("\n".join(lines).replace("\n\n\n", "\n\n") + "\n")


def _about(command: str) -> str:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "orbax-checkpoint", "grain"))
    return (
        f"Written by `{command}` on {datetime.datetime.now(datetime.UTC).date()}; {os.cpu_count()} CPU cores"
        f" ({platform.machine()}), Python {platform.python_version()}, {packages}.\n\n"
        f"Runs of {STEPS} steps of a tiny MoE, two processes of one simulated device each, started by `launch.submit"
        f" local` and started again by its supervisor, a checkpoint every {EVERY} steps. Most runs take many faults:"
        " the next one is injected once the run has saved a checkpoint since the last. After each fault, and once more"
        " at the end of the run, every step must be recorded once, and all its metrics but the times must equal those"
        " of an undisturbed run bit for bit; where updates or data are skipped, those of a run of which the same were"
        " left out by other means. The report that ends a run is left out."
    )


def _row(name: str, faults: Sequence[Fault], root: Path) -> str:
    kind = KINDS[name]
    lost, seconds = [fault.lost for fault in faults], [fault.seconds for fault in faults if fault.seconds]
    survived = sum(not fault.problems for fault in faults)
    told = next((line for fault in faults for line in fault.said if re.search(kind.message, line)), "")
    cells = [kind.what, len(faults), survived, f"{median(lost):g}", max(lost), max(fault.allowed for fault in faults)]
    cells += [f"{median(seconds):.1f}" if seconds else "", f"`{_plain(told, root)}`" if told else ""]
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _rules() -> list[str]:
    return [
        f"Steps lost: the last recorded step minus the one at which the run went on. {EVERY}, the save interval, are"
        f" allowed; {EVERY} more where the save of the last multiple of {EVERY} was not complete when the processes"
        f" were gone; {EVERY} more where the fault destroyed the newest checkpoint; none where the run was asked to"
        f" end; {MAX_SKIPPED} more, the steps of the trouble, where bad numbers ended it or sent it back. It must go on"
        " at the newest checkpoint that was complete and not damaged.",
        "",
        "Seconds to recover: median, from the fault to the first new step; where a person has to act first, from the"
        " command that goes on. Nearly all of it is the start of two Python processes.",
    ]


def _details(faults: Sequence[Fault]) -> list[str]:
    def of(*names: str) -> list[Fault]:
        return [fault for fault in faults if fault.kind in names]

    found = []
    if ended := [fault.ended_s for fault in of("sigstop")]:
        found.append(
            f"SIGSTOP: the other process ended {min(ended):.1f} to {max(ended):.1f} s later, median"
            f" {median(ended):.1f} (`cluster.heartbeat_timeout_s` was {HEARTBEAT_S}); then the supervisor killed the"
            " stopped one."
        )
    if asked := [fault for fault in of("sigterm") if fault.ended_s]:
        ended, done = [fault.ended_s for fault in asked], sum(fault.status == 0 for fault in asked)
        found.append(
            f"SIGTERM: all processes had saved and ended {min(ended):.1f} to {max(ended):.1f} s later, median"
            f" {median(ended):.1f}; JAX's preemption service takes its time to agree on a step. {done} of {len(asked)}"
            " runs had done their last step by then and finished."
        )
    if damaged := of("truncate", "flip"):
        named = sum(bool(fault.damaged) for fault in damaged)
        found.append(
            f"Damaged checkpoints: {named} of {len(damaged)} were found, named and moved to `damaged/`, and the run"
            f" went on from the one before. In the other {len(damaged) - named} the damage lay in bytes that say"
            " nothing about the state: the run went on from the newest, all checksums right."
        )
    if kills := of("kill_saving", "kill", "kill_starting"):
        cut = sum(fault.hit_save for fault in kills)
        found.append(f"Kills: {cut} of {len(kills)} left an unfinished save behind.")
    return [line for text in found for line in (text, "")]


def _plain(text: str, root: Path) -> str:
    """Without this machine's folders, on one line of bearable length."""
    text = re.sub(r"(disk|run)-\d+(-data)?/", "", text.replace(f"{root}/", "")).replace("`", "'").replace("\n", " ")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
