"""Static task routing: the task of a token names its experts; nothing is learned.

    S_t = tasks[t] + general               t = context.task_BS, the index of the token's domain
    w_e = 1 / |S_t|                        e in S_t

Sets may differ in size: every token has as many assignments as the largest set, void ones where its own is smaller. A
token of a task beyond the table goes to the `general` experts alone; without any, it reaches no expert, gets zero from
the layer (the residual stream carries it on) and counts in no load. A task that is not known to the data is task 0.

The router has no parameters, so there is no task gradient to speak of, and no logits: `log_z` is 0, `margin` +inf,
`probs` the weights, and the expert bias is not used. Experts that no token of a step names get exactly zero gradient;
an optimizer with momentum or weight decay still moves them (a layer's experts are one array: no path freezes some).

Tasks that grow: a new expert and a new row leave the outputs of the old tasks bit for bit as they were.
Collectives: none. Source: SkillNet-NLU (Zhang et al. 2022, arXiv 2203.03312), from memory, not verified.
Differs from the paper: experts have no names; skills of attention layers are not here.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe.routing.base import Context, Router, RouterConfig, Routing
from moe.routing.choice import token_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticTaskConfig(RouterConfig):
    """A table from task to experts. There is no task gradient: the router has no parameters."""

    task_gradient: ClassVar[bool] = False
    uses_bias: ClassVar[bool] = False

    tasks: tuple[tuple[int, ...], ...] = ()
    """Experts of every task, by the index of its domain."""
    general: tuple[int, ...] = ()
    """Experts of every token, whatever its task."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.tasks:
            yield "tasks", "must name the experts of at least one task"
        for index, experts in enumerate(self.tasks):
            if len(set(experts)) < len(experts):
                yield "tasks", f"task {index} names an expert twice"
            if not experts and not self.general:
                yield "tasks", f"task {index} has no expert, and there is no general one"
        if len(set(self.general)) < len(self.general):
            yield "general", "names an expert twice"

    def layer_problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        for field, named in (("tasks", [e for experts in self.tasks for e in experts]), ("general", self.general)):
            if bad := [e for e in named if not 0 <= e < num_experts]:
                yield field, f"expert {bad[0]} is not one of the layer's: 0 to num_experts - 1 = {num_experts - 1}"

    def experts_per_token(self, num_experts: int) -> float:
        """The largest set: shapes are static, so a smaller one is filled up with void assignments."""
        return max(map(len, self.sets()))

    def sets(self) -> list[list[int]]:
        """The experts of every task, sorted; last those of a task beyond the table."""
        return [sorted({*experts, *self.general}) for experts in (*self.tasks, ())]

    def build(self, key: jax.Array, width: int, num_experts: int) -> "StaticTask":
        return StaticTask(self, num_experts)


class StaticTask(Router):
    """x is not read. No parameters."""

    def __init__(self, config: StaticTaskConfig, num_experts: int):
        self.config = config
        self.num_experts = num_experts

    def __call__(self, x_BSD: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        sets, E = self.config.sets(), self.num_experts
        table_tK = np.full((len(sets), max(map(len, sets))), E, np.int32)  # E: void
        for row, experts in zip(table_tK, sets, strict=True):
            row[: len(experts)] = experts
        beyond = len(sets) - 1
        task_BS = context.task_BS
        task_BS = jnp.where((task_BS >= 0) & (task_BS < beyond), task_BS, beyond)

        expert_BSK = jnp.asarray(table_tK)[task_BS]
        taken_BSK = expert_BSK < E
        weight_BSK = taken_BSK / jnp.maximum(taken_BSK.sum(axis=-1, keepdims=True), 1).astype(jnp.float32)
        one_hot_BSKE = expert_BSK[..., None] == jnp.arange(E)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=weight_BSK,
            probs_BSE=(weight_BSK[..., None] * one_hot_BSKE).sum(axis=-2),
            log_z_BS=jnp.zeros(task_BS.shape, jnp.float32),
            margin_BS=jnp.full(task_BS.shape, jnp.inf),
            taken_BSK=taken_BSK,
        )

    def symmetry(self, key: jax.Array, num_experts: int) -> tuple[jax.Array, "StaticTask"]:
        """Any permutation, applied to the table."""
        order_E = jax.random.permutation(key, num_experts)
        new_name = np.argsort(np.asarray(order_E)).tolist()
        renamed = dataclasses.replace(
            self.config,
            tasks=tuple(tuple(new_name[e] for e in experts) for experts in self.config.tasks),
            general=tuple(new_name[e] for e in self.config.general),
        )
        return order_E, StaticTask(renamed, num_experts)
