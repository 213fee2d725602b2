"""The pipeline's schedule and bubble, where its layers lie, what it sends; its numbers are in `test_pipeline_equal`."""

import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes, param
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.layers.attention import AttentionConfig
from moe.layers.mlp import MLPConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.models.pipeline import PipelineConfig
from moe.models.schedule import Schedule
from moe.train.loss import forward
from moe.train.run import RunConfig
from tests.collectives import collectives
from tests.grid_batch import batch

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=2, head_width=8)
DENSE = DecoderConfig(vocab_size=264, width=16, num_layers=4, moe=None, mlp_hidden=24, attention=ATTENTION)
SIZES = [(2, 4, 1), (2, 3, 1), (4, 2, 1), (2, 4, 2), (2, 6, 3), (4, 8, 2), (4, 4, 1)]


def simulated(schedule: Schedule) -> tuple[list[tuple[int, ...]], int]:
    """(what each micro-batch's output went through, idle iterations of all stages), from the schedule's table alone."""
    P, table = schedule.stages, schedule.table()
    held: list[Any] = [(0, ())] * P  # (micro-batch, chunks it has been through)
    out: list[Any] = [None] * schedule.microbatches
    work: Counter[tuple[int, int]] = Counter()
    for t in range(schedule.num_iterations):
        held = [held[-1], *held[:-1]]
        if table["fresh"][t]:
            held[0] = (int(table["takes"][t]), ())
        held = [(m, (*been, int(table["round"][t, p]) * P + p)) for p, (m, been) in enumerate(held)]
        for m, been in held:
            work[m, len(been)] += len(been) <= P * schedule.rounds and been == tuple(range(len(been)))
        out[table["gives"][t]] = held[-1]
    assert [m for m, _ in out] == list(range(schedule.microbatches))
    useful = schedule.microbatches * schedule.rounds * P
    return [been for _, been in out], schedule.num_iterations * P - useful


@pytest.mark.parametrize(("stages", "microbatches", "rounds"), SIZES)
def test_every_micro_batch_runs_through_all_chunks_in_order(stages: int, microbatches: int, rounds: int) -> None:
    paths, idle = simulated(Schedule(stages, microbatches, rounds))
    assert paths == [tuple(range(stages * rounds))] * microbatches
    total = stages * (microbatches * rounds + stages - 1)
    bubble = PipelineConfig(microbatches=microbatches, rounds=rounds).bubble(stages)
    assert idle / total == pytest.approx(bubble, rel=1e-12)


def test_the_interleaved_order_by_hand() -> None:
    # 2 stages, 4 micro-batches, 2 rounds: micro-batches 0 1 in both rounds, then 2 3; one iteration to drain.
    table = Schedule(2, 4, 2).table()
    assert table["takes"].tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 3]
    assert table["fresh"].tolist() == [True, True, False, False, True, True, False, False, False]
    assert table["round"][1:].T.tolist() == [[0, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1]]
    assert table["gives"][1:].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("broken", ["takes", "fresh", "round", "gives"])
def test_a_wrong_schedule_would_be_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Schedule.table
    monkeypatch.setattr(Schedule, "table", lambda self: right(self) | {broken: np.roll(right(self)[broken], 1, axis=0)})
    schedule = Schedule(2, 4, 2)
    with pytest.raises((AssertionError, TypeError)):
        assert simulated(schedule)[0] == [tuple(range(4))] * 4


def multiply_adds(jaxpr: Any) -> int:
    """Of all matrix products, as often as loops run them."""
    total = 0
    for eqn in jaxpr.eqns:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "dot_general":
            ((left, _), _) = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in left)
        total += times * sum(multiply_adds(part) for part in jax.extend.core.jaxprs_in_params(eqn.params))
    return total


def hidden(config: DecoderConfig) -> Any:
    def of(params: Any, arrays: Any) -> jax.Array:
        found = forward(
            config.abstract(), params, arrays, jnp.zeros((0, 1)), step=jnp.int32(1), key=jax.random.key(0), train=True
        )
        return found.hidden_BSD.sum()

    return of


def abstract(config: DecoderConfig) -> Any:
    return param.pure(config.abstract())


@pytest.mark.parametrize(
    ("stages", "microbatches", "rounds", "remat"),
    [(2, 4, 1, "none"), (4, 8, 1, "dots"), (2, 4, 2, "full"), (2, 4, 2, "dots")],
)
def test_the_bubble_of_the_program_is_that_of_the_paper(
    stages: int, microbatches: int, rounds: int, remat: Any
) -> None:
    # Under remat too: what a policy keeps without stages it keeps with them, or products would be computed once more.
    config = PipelineConfig(microbatches=microbatches, rounds=rounds)
    arrays, plain = batch(sequences=8), dataclasses.replace(DENSE, remat=remat)
    useful = multiply_adds(jax.make_jaxpr(jax.grad(hidden(plain)))(abstract(plain), arrays).jaxpr)
    with jax.set_mesh(axes.make_mesh(MeshConfig(stages=stages, data=1), jax.devices()[:stages])):
        piped = dataclasses.replace(plain, pipeline=config)
        done = multiply_adds(jax.make_jaxpr(jax.grad(hidden(piped)))(abstract(piped), arrays).jaxpr)
    assert 1 - useful / done == pytest.approx(config.bubble(stages), rel=1e-12)


def test_an_iteration_sends_the_micro_batch_to_the_next_stage_and_nothing_else() -> None:
    config = dataclasses.replace(DENSE, pipeline=PipelineConfig(microbatches=4))
    mesh = axes.make_mesh(MeshConfig(stages=2, data=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            abstract(config), param.shardings(config.abstract(), mesh),
        )  # fmt: skip
        arrays = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=axes.sharding(mesh, ("batch", None)))
            for name, value in batch(sequences=16).items()
        }
        text = jax.jit(hidden(config)).lower(params, arrays).compile().as_text()
    sent = collectives(text)
    x = 2 * 16 * 16  # a micro-batch of 16 / 4 sequences, cut in 2 over data: b S D
    assert sent[("collective-permute", f"f32 {x}", 5)] == 1
    assert {kind for kind, _, times in sent if times > 1} == {"collective-permute"}
    assert sent[("all-reduce", f"f32 {4 * x}", 1)] == 1  # the outputs of the last stage


def test_stages_hold_consecutive_layers_and_the_tree_is_as_without_them() -> None:
    config = dataclasses.replace(DENSE, pipeline=PipelineConfig(microbatches=2, rounds=2))
    mesh = axes.make_mesh(MeshConfig(stages=2, data=1), jax.devices()[:2])
    model = config.abstract()
    assert jax.tree.structure(abstract(config)) == jax.tree.structure(abstract(DENSE))
    for name, sharding in param.shardings(model, mesh)["stacks"][0][0]["attention"].items():
        shape = abstract(config)["stacks"][0][0]["attention"][name].shape
        assert sharding.shard_shape(shape) == (2, *shape[1:])
        assert [index[0] for index in sharding.devices_indices_map(shape).values()] == [slice(0, 2), slice(2, 4)]
    assert param.specs(model, 1) == param.specs(DENSE.abstract(), 2)
    assert param.specs(model, 4) == param.specs(model, 1)  # 4 stages of 2 rounds do not divide 4 layers


def refused(
    message: str, mesh: MeshConfig, batch_size: int = 16, model: DecoderConfig = DENSE, **pipeline: int
) -> None:
    config = dataclasses.replace(model, pipeline=PipelineConfig(**pipeline) if pipeline else None)
    with pytest.raises(ConfigError, match=message):
        check(RunConfig(batch_size=batch_size, mesh=mesh, model=config, balance=()))


def test_sizes_that_cannot_work_are_refused_with_the_nearest_that_can() -> None:
    pair = DecoderConfig(
        vocab_size=264, stacks=tuple(StackConfig(layers=(ATTENTION, MLPConfig(hidden=8)), repeats=R) for R in (6, 9))
    )
    refused(
        r"model.pipeline.rounds = 1: times mesh.stages = 4 must divide the repeats of a stack, which are 6, 9; the"
        r" nearest numbers of stages that do: 2, 3, 6",
        MeshConfig(stages=4, data=1), model=pair, microbatches=4,
    )  # fmt: skip
    refused(
        r"model.pipeline.microbatches = 3: times data \* fsdp = 2 must divide the 16 .* nearest that do: 1, 2, 4",
        MeshConfig(stages=2, data=2), microbatches=3,
    )  # fmt: skip
    deep = dataclasses.replace(DENSE, num_layers=8)
    refused(
        "microbatches = 2: must be divisible by mesh.stages = 4",
        MeshConfig(stages=4, data=1), model=deep, microbatches=2, rounds=2,
    )  # fmt: skip
    refused("mesh.stages = 2: must be 1 without model.pipeline", MeshConfig(stages=2, data=1))
    refused("model.pipeline = .*: is ignored with mesh.stages = 1", MeshConfig(data=1), microbatches=2)


def test_a_batch_that_the_micro_batches_do_not_divide_is_refused_where_it_runs() -> None:
    config = dataclasses.replace(DENSE, pipeline=PipelineConfig(microbatches=3))
    with (
        jax.set_mesh(axes.make_mesh(MeshConfig(stages=2, data=1), jax.devices()[:2])),
        pytest.raises(ConfigError, match="microbatches = 3: must divide the batch of 8 sequences"),
    ):
        jax.eval_shape(hidden(config), abstract(config), batch(sequences=8))
