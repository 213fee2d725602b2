"""Checks that both clouds share: names, the environment that is given, where a workdir may be, the config's mesh."""

import dataclasses
import re
from typing import TYPE_CHECKING

from launch.cli import load_function, override
from launch.submit.base import Job
from moe.config import ConfigError, check

if TYPE_CHECKING:
    from moe.train.run import RunConfig

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(
    r"(?i)(^|_)(token|secret|secrets|password|passwd|passphrase|key|keys|apikey|credentials?|auth)(_|$)"
)
RESERVED = ("MOE_COORDINATOR", "MOE_NUM_PROCESSES", "MOE_PROCESS_ID", "MOE_SLICE")


def name_problem(name: str, longest: str) -> str | None:
    """What is wrong with a DNS label (RFC 1035) of which `longest` is made; None if nothing."""
    if not _NAME.fullmatch(name):
        return "must be small letters, digits and -, begin with a letter and not end with -"
    if len(longest) > 63:
        return f"is {len(longest) - 63} letters too long: {longest!r} may have 63"
    return None


def check_environment(env: tuple[str, ...], secrets: tuple[str, ...], form: str, kept: re.Pattern[str]) -> None:
    """ConfigError for `env` (NAME=VALUE) or `secrets` (NAME=where it is kept, of this form and pattern).

    Raised, not yielded as other problems are: the message must not repeat a value, which may be a secret.
    """
    names = [word.partition("=")[0] for word in (*env, *secrets)]
    for field, words, asked in (("env", env, "NAME=VALUE"), ("secrets", secrets, form)):
        for index, word in enumerate(words):
            name, equals, value = word.partition("=")
            if not equals or not VARIABLE.fullmatch(name) or (field == "secrets" and not kept.fullmatch(value)):
                raise ConfigError(f"{field}.{index} (not shown): must be {asked}, with a NAME of letters, digits and _")
            if name in RESERVED:
                raise ConfigError(f"{field}.{index} = {name}=...: is set by launch.submit")
            if names.count(name) > 1:
                raise ConfigError(f"{field}.{index} = {name}=...: {name} is given twice")
            if field == "env" and SECRET.search(name):
                raise ConfigError(f"env.{index} = {name}=...: looks like a secret; give it as --secrets {form}")


def configured(job: Job) -> "RunConfig":
    """The job's config with its words applied, as `launch.train` will make it."""
    from moe.train.run import RunConfig

    base = load_function(job.spec)
    if not isinstance(base, RunConfig):
        raise ConfigError(f"config = {job.spec!r}: must return a RunConfig, got {type(base).__name__}")
    return override(base, job.words, f"python -m launch.train {job.spec}")


def check_job(job: Job, devices: int, mount: str) -> None:
    """ConfigError for a workdir that ends with its host, or a config that does not fit the devices."""
    if not job.workdir.startswith(f"{mount}/") or ".." in job.workdir.split("/"):
        raise ConfigError(f"workdir = {job.workdir!r}: must be below {mount}, where every host mounts the same folder")
    run = configured(job)
    # With the number of devices the checks of batch, experts and layers against the mesh can be made too.
    check(dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, data=run.mesh.sizes(devices)["data"])))
