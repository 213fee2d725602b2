"""RunConfig: everything a training run depends on, in one frozen tree."""

import dataclasses
import math
from collections.abc import Iterator

from moe.axes import MeshConfig
from moe.balance import BalanceRule, LoadBalanceConfig, asked
from moe.cluster.config import ClusterConfig
from moe.config import at_least, walk
from moe.data import DataConfig
from moe.kernels.attend import AttendConfig
from moe.models import DecoderConfig
from moe.optim import AdamWConfig
from moe.routing.base import RouterConfig
from moe.train import exchanges
from moe.train.ladder import LadderConfig, at_capacity
from moe.train.watchdog import WatchdogConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """How many of the newest to keep."""
    keep_best: int = 1
    """How many of those with the lowest validation bits per byte to keep."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, every=1, keep_last=1, keep_best=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation on held-out documents, domain by domain."""

    every: int = 200
    """Steps between evaluations during training; 0: only at the end."""
    max_bytes: int = 16_384
    """Held-out bytes per domain during training."""
    final_max_bytes: int = 65_536
    """Held-out bytes per domain at the end and in `launch.evaluate`."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, every=0, max_bytes=1024, final_max_bytes=1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RollbackConfig:
    """What a run does once `max_skipped` updates in a row were skipped, instead of ending at once."""

    times: int = 0
    """How often it may go back to the newest checkpoint from before the trouble; 0: it ends."""
    skip_data: bool = False
    """Go on with the data after the last skipped step; False: read the same data again."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, times=0)
        if self.skip_data and not self.times:
            yield "skip_data", "needs times of at least 1: without a rollback no data are skipped"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    seed: int = 0
    """Seed of the parameters, of the order of the data and of the routers' noise."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 64
    """Sequences in the global batch of one optimizer step."""
    accumulation: int = 1
    """A, micro-batches the global batch is cut into; must divide batch_size. Changes memory, not numbers."""
    model: DecoderConfig = DecoderConfig()
    balance: tuple[BalanceRule, ...] = (LoadBalanceConfig(),)
    """What keeps experts in use; every rule acts on every MoE layer. Must be empty for a model without one."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: AdamWConfig = AdamWConfig()
    mesh: MeshConfig = MeshConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    profile: tuple[int, int] | None = None
    """First and last step of a trace written to WORKDIR/profile (open it with TensorBoard or xprof)."""
    ladder: LadderConfig | None = None
    """Sizes that the experts' buffers may take, chosen by the load as training goes; None: as the layers say."""
    init_from: str | None = None
    """Workdir of another run whose parameters this one starts from; step, optimizer and data start anew."""
    max_skipped: int = 10
    """Updates in a row that may be skipped because loss or gradient is not finite, before the run goes back or ends."""
    rollback: RollbackConfig = RollbackConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, seed=0, steps=1, batch_size=1, accumulation=1, max_skipped=1)
        if self.batch_size % self.accumulation:
            yield "batch_size", f"must be divisible by accumulation = {self.accumulation}"
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1] <= self.steps:
            yield "profile", f"must be first and last step, 1 <= first <= last <= steps = {self.steps}"
        if self.checkpoint.keep_best and not self.evaluates_before_saving:
            yield (
                "checkpoint.keep_best",
                f"is ignored, as no checkpoint is evaluated: make checkpoint.every = {self.checkpoint.every} a multiple"
                f" of evaluate.every = {self.evaluate.every}, or leave keep_best at 0",
            )
        for field, limit in self.optim.schedule.run_problems(self.steps):
            yield f"optim.schedule.{field}", limit
        if self.ladder is not None:
            if fixed := next(exchanges.not_sized(self.model), None):
                yield "ladder", f"cannot size {fixed}: its need is not counted; use AllToAllConfig, or no budget there"
            elif at_capacity(self.model, 1.0) == at_capacity(self.model, 2.0):
                yield "ladder", "sizes nothing: no layer's dispatch has a capacity, and no exchange a budget"
        yield from self._mesh_problems()
        yield from self._balance_problems()

    def _balance_problems(self) -> Iterator[tuple[str, str]]:
        if self.balance and not self.model.num_moe_layers:
            yield "balance", "must be (): the model has no MoE layer for it to act on"
        names = [rule.name for rule in self.balance]
        for index, rule in enumerate(self.balance):
            if rule.name in ("lm", "ahead"):  # the language model's own terms in the log
                yield f"balance.{index}.name", f"must not be {rule.name!r}: `loss/{rule.name}` is the model's own loss"
            if rule.name in names[:index]:
                yield f"balance.{index}.name", "must differ from the names of the other balance rules"
            for field, limit in rule.batch_problems(self.accumulation, self.microbatch_size):
                yield f"balance.{index}.{field}", limit
            if self.model.num_moe_layers:
                for field, limit in rule.model_problems(self.model.exists_LE):
                    yield f"balance.{index}.{field}", limit
        yield from self._bias_problems()

    def _bias_problems(self) -> Iterator[tuple[str, str]]:
        """A rule that moves the expert bias, and a router that does not read it; two rules that ask for two things."""
        routers = [part for _, part in walk(self.model) if isinstance(part, RouterConfig)]
        deaf = [type(router).__name__ for router in routers if not router.uses_bias]
        scoreless = [type(router).__name__ for router in routers if not router.gives_scores]
        for index, rule in enumerate(self.balance):
            if rule.moves_bias and deaf:
                yield f"balance.{index}.name", f"moves the expert bias, which {deaf[0]} does not read"
            elif rule.weighs and routers and not any(router.task_gradient for router in routers):
                yield (
                    f"balance.{index}.coefficient",
                    f"weighs a constant: {type(routers[0]).__name__} has nothing to learn; leave the rule out",
                )
            elif "shortfall" in rule.asks() and scoreless:
                yield (
                    f"balance.{index}.name",
                    f"reads selection scores, which {scoreless[0]} does not give as it is set",
                )
        try:
            asked(self.balance)
        except ValueError as error:
            yield "balance", str(error)

    def _mesh_problems(self) -> Iterator[tuple[str, str]]:
        mesh, model = self.mesh, self.model
        cuts = (mesh.data if mesh.data > 0 else 1) * mesh.fsdp
        if self.microbatch_size % cuts:
            yield (
                "batch_size",
                f"a micro-batch of {self.microbatch_size} sequences must be divisible by data * fsdp = {cuts}",
            )
        divisible = [("width", model.width, "fsdp"), ("width", model.width, "context")]
        divisible += [("vocab_size", model.vocab_size, "tensor")]
        for prefix, sublayer in model.sublayers:
            divisible += [(prefix + field, size, axis) for field, size, axis in sublayer.divisible()]
        for path, size, axis in divisible:
            if size % (cut := math.prod(getattr(mesh, name) for name in axis.split(" * "))):
                yield f"model.{path}", f"must be divisible by mesh.{axis} = {cut}"
        if model.pipeline is not None:
            for field, limit in model.pipeline.mesh_problems(model.trunk, mesh.stages, self.microbatch_size, cuts):
                yield f"model.{field}", limit
        elif mesh.stages > 1:
            yield "mesh.stages", "must be 1 without model.pipeline, which says how the batch passes through the stages"
        if model.width % (cut := mesh.fsdp * mesh.context):
            yield "model.width", f"must be divisible by fsdp * context = {cut}, which cut the parameters"
        if (sizes := mesh.known_factors) is not None:
            yield from exchanges.mesh_problems(model, sizes)
        yield from self._length_problems()

    def _length_problems(self) -> Iterator[tuple[str, str]]:
        S, mesh = self.data.seq_len, self.mesh
        if S % (cut := mesh.context * mesh.tensor):
            yield "data.seq_len", f"must be divisible by context * tensor = {cut}, which cut the residual stream"
        for where, part in walk(self.model, "model."):
            if isinstance(part, AttendConfig):
                for field, limit in part.length_problems(S, mesh.context):
                    yield f"{where}{field}", limit

    @property
    def evaluates_before_saving(self) -> bool:
        """Whether some step is both evaluated and saved."""
        return self.evaluate.every > 0 and (
            math.lcm(self.checkpoint.every, self.evaluate.every) <= self.steps or self.steps % self.evaluate.every == 0
        )

    @property
    def microbatch_size(self) -> int:
        """B, sequences in one micro-batch over all devices."""
        return self.batch_size // self.accumulation
