"""The best layouts of a run on a number of devices: mesh, remat policy and accumulation, by the planner's own model.

Every legal combination competes; what cannot win is left out before it is costed, which changes no result:

    memory   what no remat policy and no accumulation can lessen does not fit (`least_bytes`), and something else does,
             or is leaner than that: the mesh is not asked whether it is legal
    time     compute alone, at full efficiency and without communication, is already slower than the k-th best so far
    A        with one stage and the same mesh and policy, more accumulation never makes a step faster
             (every micro-batch gathers the weights again): the smallest A that fits is the best one

`every` costs all combinations without any of this; the tests hold the two against each other.
Source: Miao et al. 2022, Galvatron (arXiv 2211.13878), sections 3 and 4, for the space and for leaving the infeasible
out first. Differs from the paper: all layers share one layout, so there is nothing for its dynamic programme over
layers to decide; expert axes fold over the dense ones.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

from moe.config import ConfigError, at_least
from moe.folding import MeshConfig
from moe.models.pipeline import PipelineConfig
from moe.models.remat import Remat
from moe.plan.chips import Chip
from moe.plan.cost import Assumptions, Cost, cost, fastest, mfu
from moe.plan.memory import Memory, least_bytes, memory, state_bytes
from moe.plan.workload import Workload, grid_of, weights

Legal = Callable[[Workload], bool]
"""Whether the run's own checks accept this layout."""


class Plan(NamedTuple):
    """One layout and what the models say of it."""

    work: Workload
    cost: Cost
    memory: Memory
    mfu: float

    @property
    def seconds(self) -> float:
        return self.cost.step


class Lean(NamedTuple):
    """The layout that needs the least memory of those that do not fit."""

    work: Workload
    memory: Memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """What may be chosen."""

    remat: tuple[str, ...] = ("none", "dots", "save_attention", "collectives", "attention_collectives", "full")
    """Remat policies to try."""
    max_stages: int = 1
    """Most pipeline stages; 1: no pipelines, which cost a bubble."""
    max_tensor: int = 8
    """Most pieces of heads and hidden widths."""
    max_context: int = 8
    """Most pieces of a sequence."""
    max_expert_tensor: int = 4
    """Most pieces of an expert's hidden width."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, max_stages=1, max_tensor=1, max_context=1, max_expert_tensor=1)
        for name in self.remat:
            if name not in get_args(Remat):
                yield "remat", f"must hold remat policies: {', '.join(get_args(Remat))}"


class Infeasible(ConfigError):
    """No legal layout fits; the message says what is missing."""


def meshes(work: Workload, space: Space) -> Iterator[MeshConfig]:
    """Every mesh of the space over these devices whose grids fold."""
    E = max(work.model.num_experts_L, default=1)
    for stages, context, tensor in itertools.product(
        divisors(work.devices, space.max_stages),
        divisors(work.devices, space.max_context),
        divisors(work.devices, space.max_tensor),
    ):
        left, rest = divmod(work.devices, stages * context * tensor)
        for fsdp in divisors(left) if not rest else ():
            dense = {"stages": stages, "data": left // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
            grid = work.devices // stages
            for expert, expert_tensor in itertools.product(divisors(grid, E), divisors(grid, space.max_expert_tensor)):
                mesh = MeshConfig(**dense, expert=expert, expert_tensor=expert_tensor)
                if E % expert == 0 and (E > 1 or expert_tensor == 1) and _folds(mesh, work.devices):
                    yield mesh


def candidates(
    work: Workload, space: Space, legal: Legal, hopeless: Callable[[Workload], bool] = lambda _: False
) -> Iterator[list[Workload]]:
    """For every mesh, pipeline and remat policy the legal workloads, by rising accumulation.

    `legal` is asked once for a mesh, pipeline and accumulation: what is recomputed is no matter of legality. It is what
    takes time, so `hopeless` is asked before it: whether nothing on this mesh can be of use.
    """
    for mesh in meshes(work, space):
        most, rest = divmod(work.batch_size, mesh.data * mesh.fsdp)
        if rest or not divides(work, mesh) or hopeless(dataclasses.replace(work, mesh=mesh)):
            continue
        for pipeline in pipelines(work, mesh):
            model = dataclasses.replace(work.model, pipeline=pipeline)
            tried = [dataclasses.replace(work, model=model, mesh=mesh, accumulation=A) for A in divisors(most)]
            if found := [one for one in tried if legal(one)]:
                for remat in space.remat:
                    changed = dataclasses.replace(model, remat=remat)  # type: ignore[arg-type]
                    yield [dataclasses.replace(one, model=changed) for one in found]


def pipelines(work: Workload, mesh: MeshConfig) -> list[PipelineConfig | None]:
    """How a batch may pass through the mesh's stages: the given way, or with 1, 2 or 4 micro-batches a stage."""
    if mesh.stages == 1:
        return [None]
    given = work.model.pipeline
    return [given] if given is not None else [PipelineConfig(microbatches=n * mesh.stages) for n in (1, 2, 4)]


def divides(work: Workload, mesh: MeshConfig) -> bool:
    """Whether the mesh cuts every parameter evenly."""
    grid = grid_of(mesh, work.devices)
    shapes = {pair for one in weights(work.model) for pair in zip(one.shape, one.axes, strict=True)}
    return all(n % grid.pieces(axis) == 0 for n, axis in shapes)


def best(
    work: Workload, chip: Chip, legal: Legal, *, space: Space | None = None, top: int = 3,
    assume: Assumptions | None = None, spare: float = 0.0,
) -> list[Plan]:  # fmt: skip
    """The `top` fastest plans that fit, fastest first; mesh, remat and accumulation of `work` are not looked at.

    `spare`: share of a device's memory to leave free. Raises Infeasible, saying what is missing.
    """
    limit, kept = chip.usable * (1 - spare), _Best(top)
    assume, space = assume or Assumptions(), space or Space()
    leanest: Lean | None = None

    def hopeless(one: Workload) -> bool:
        bytes_ = least_bytes(one)
        return bytes_ > limit and (bool(kept.plans) or (leanest is not None and bytes_ >= leanest.memory.total))

    for group in candidates(work, space, legal, hopeless):
        if fastest(group[0], chip, assume) > kept.bar:
            continue
        for one in group[-1:] if state_bytes(group[0]) > limit else group:
            need = memory(one)
            if need.total > limit:
                if leanest is None or need.total < leanest.memory.total:
                    leanest = Lean(one, need)
                continue
            kept.add(_plan(one, chip, assume, need))
            if one.mesh.stages == 1:
                break
    if not kept.plans:
        raise Infeasible(_missing(work, chip, limit, leanest))
    return kept.plans


def fits(work: Workload, chip: Chip, legal: Legal, *, space: Space | None = None, spare: float = 0.0) -> bool:
    """Whether `best` would find anything."""
    limit = chip.usable * (1 - spare)
    groups = candidates(work, space or Space(), legal, lambda one: least_bytes(one) > limit)
    return any(memory(one).total <= limit for group in groups for one in group)


def every(
    work: Workload, chip: Chip, legal: Legal, *, space: Space | None = None, assume: Assumptions | None = None,
    spare: float = 0.0,
) -> list[Plan]:  # fmt: skip
    """All plans that fit, fastest first, without leaving any out beforehand."""
    limit = chip.usable * (1 - spare)
    groups = candidates(work, space or Space(), legal)
    found = [_plan(one, chip, assume or Assumptions()) for group in groups for one in group]
    return sorted((plan for plan in found if plan.memory.total <= limit), key=_key)


def judge(work: Workload, chip: Chip, assume: Assumptions | None = None) -> Plan:
    """What the models say of one given layout."""
    return _plan(work, chip, assume or Assumptions())


class _Best:
    """The k fastest plans so far."""

    def __init__(self, size: int):
        self.size = size
        self.plans: list[Plan] = []

    @property
    def bar(self) -> float:
        """Seconds that a plan must stay below to be kept."""
        return self.plans[-1].seconds if len(self.plans) == self.size else float("inf")

    def add(self, plan: Plan) -> None:
        self.plans = sorted([*self.plans, plan], key=_key)[: self.size]


def _key(plan: Plan) -> tuple:
    """By time; of equal plans the one with less accumulation, less memory, the plainer mesh."""
    mesh = plan.work.mesh
    plain = (mesh.stages, mesh.tensor, mesh.context, mesh.expert_tensor, mesh.expert, mesh.fsdp)
    return plan.seconds, plan.work.accumulation, plan.memory.total, plain, plan.work.model.remat


def _plan(work: Workload, chip: Chip, assume: Assumptions, need: Memory | None = None) -> Plan:
    seconds = cost(work, chip, assume)
    return Plan(work, seconds, need or memory(work), mfu(work, chip, seconds.step))


def _missing(work: Workload, chip: Chip, limit: float, plan: Lean | None) -> str:
    chips = work.devices // chip.devices
    asked = f"{chips} {chip.name} with {work.batch_size} sequences of {work.seq_len}"
    if plan is None:
        return f"{asked}: no mesh, remat policy and accumulation of the space passes the run's own checks"
    need, have = plan.memory.total * work.devices, chip.usable * work.devices
    largest = sorted(plan.memory.terms().items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in largest)
    return (
        f"{asked}: nothing fits. The leanest layout needs {plan.memory.total / 1e9:.1f} GB on a device that has"
        f" {limit / 1e9:.1f} ({parts}): {_tb(need)} in all, where {chips} chips have {_tb(have)}."
        f" The leanest: {describe(plan.work)}"
    )


def smallest(
    work: Workload, chip: Chip, legal: Legal, *, space: Space | None = None, spare: float = 0.0, most: int = 16
) -> int | None:
    """The first number of chips, doubling from that of `work`, on which something fits; None up to `most` times."""
    factor = 2
    while factor <= most:
        more = dataclasses.replace(work, devices=work.devices * factor)
        if fits(more, chip, legal, space=space, spare=spare):
            return more.devices // chip.devices
        factor *= 2
    return None


def describe(work: Workload) -> str:
    """The layout as words: sizes above 1, remat, accumulation."""
    sizes = work.mesh.sizes(work.devices)
    named = [f"{name}={size}" for name, size in sizes.items() if size > 1 and name != "expert_data"]
    pipeline = [f"microbatches={work.model.pipeline.microbatches}"] if work.model.pipeline is not None else []
    return ", ".join([*named, *pipeline, f"remat={work.model.remat}", f"accumulation={work.accumulation}"])


def divisors(number: int, most: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _folds(mesh: MeshConfig, devices: int) -> bool:
    try:
        grid_of(mesh, devices)
    except ConfigError:
        return False
    return True


def _tb(size: float) -> str:
    return f"{size / 1e12:.2f} TB"
