"""One step, many layouts: loss, gradients, load and update are those of one device, to 1e-5 in float32.

Guards against expert gradients times the expert-parallel degree (DeepSpeed #5618), gradient norms that count a
replicated parameter twice, statistics that stay inside a stage or a piece of the context.
"""

from collections import Counter
from unittest import mock

import jax
import numpy as np
import pytest

from moe import axes
from moe.dispatch import AllToAllConfig
from moe.models.pipeline import PipelineConfig
from tests import layouts
from tests.layouts import Layout, measure, oracle, same

FOLDED = layouts.selection()
STAGED = [
    Layout(
        mesh=(("stages", 2), ("fsdp", 2), ("context", 2), ("expert", 4)),
        exchange=AllToAllConfig(hierarchical=True), pipeline=PipelineConfig(microbatches=4),
    ),
    Layout(
        mesh=(("stages", 2), ("context", 2), ("tensor", 2), ("expert", 2), ("expert_tensor", 2)),
        attend="ring", pipeline=PipelineConfig(microbatches=2, rounds=2), remat="full",
    ),
    Layout(mesh=(("stages", 4), ("data", 2), ("expert", 2)), pipeline=PipelineConfig(microbatches=8), accumulation=2),
]  # fmt: skip


def test_the_selection_covers_every_grid_every_pair_of_axes_and_every_exchange() -> None:
    sizes = [layout.mesh_config.sizes(layouts.DEVICES) for layout in FOLDED]
    dense = Counter((of["data"] * of["fsdp"], of["context"], of["tensor"]) for of in sizes)
    experts = Counter((of["expert_data"], of["expert"], of["expert_tensor"]) for of in sizes)
    assert len(set(FOLDED)) == len(FOLDED) == 30
    assert dense == experts == Counter(dict.fromkeys(layouts.GRID, 3))
    used = {name for layout in FOLDED for name in layout.mesh_config.factors(layouts.DEVICES) if used_in(layout, name)}
    assert used >= {*axes.MESH_AXES} - {"stage"}
    assert {layout.exchange for layout in FOLDED} == set(layouts.EXCHANGES)
    assert {layout.attend for layout in FOLDED} == {"whole", "gather", "ring"}


def used_in(layout: Layout, name: str) -> bool:
    return layout.mesh_config.factors(layouts.DEVICES)[name] > 1


@pytest.mark.parametrize("layout", [*FOLDED, *STAGED], ids=str)
def test_the_step_of_a_layout_is_that_of_one_device(layout: Layout) -> None:
    same(measure(layout), oracle())


def test_the_oracle_is_a_step_that_could_go_wrong() -> None:
    """Experts take unequal loads, and every leaf has a gradient that could be scaled."""
    expected = oracle()
    load_LE = expected.count_LGE.sum(axis=1)
    assert (load_LE.max(axis=1) > 1.2 * load_LE.min(axis=1)).all() and not expected.dropped
    assert all(np.linalg.norm(leaf) > 0 for leaf in jax.tree.leaves(expected.gradients))


def test_expert_gradients_times_the_number_of_replicas_are_caught() -> None:
    """As if the sum over `expert_data` were taken twice."""
    plain = jax.lax.all_gather
    layout = Layout(mesh=(("fsdp", 8), ("expert", 4)))

    def twice(x: jax.Array, names: object, **how: object) -> jax.Array:
        found = plain(x, names, **how)
        return found + (found - jax.lax.stop_gradient(found)) if names == ("fsdp",) else found

    with mock.patch.object(jax.lax, "all_gather", twice):
        found = measure(layout)
    with pytest.raises(AssertionError, match=r"gradient"):
        same(found, oracle())
