"""The sublayers beside attention, MLP and experts, inside a decoder: they train, generate and are counted there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe import axes, param
from moe.axes import MeshConfig
from moe.config import check
from moe.layers.attention import AttentionConfig
from moe.layers.base import SublayerConfig
from moe.layers.finedeep import FinedeepConfig
from moe.layers.mixture_of_attention import MixtureOfAttentionConfig
from moe.layers.moe import MoEConfig
from moe.layers.parallel import ParallelConfig
from moe.layers.peer import PEERConfig
from moe.layers.product_key_memory import ProductKeyMemoryConfig
from moe.models import DecoderConfig
from moe.models.layout import StackConfig
from moe.models.sample import generate
from moe.optim import AdamWConfig, WarmupCosineConfig
from moe.plan.parameters import count
from moe.routing.base import Context
from moe.routing.topk import TopKConfig
from moe.train.run import RunConfig
from moe.train.state import create_state, make_optimizer, state_shardings
from moe.train.step import BATCH_LOGICAL, jit_step
from tests import grid
from tests.routing.contexts import context_for

G = 8
HEADS = AttentionConfig(num_heads=2, num_kv_heads=2, head_width=8)
ATTENTION = MixtureOfAttentionConfig(num_experts=2, attention=HEADS)
SHARED = MixtureOfAttentionConfig(num_experts=2, attention=HEADS, shared_kv=True)
VALUES = ProductKeyMemoryConfig(num_keys=6, num_heads=2, num_selected=4, key_width=8, gated=True)
PAIRS = PEERConfig(num_keys=6, num_heads=2, num_selected=4, key_width=8)
SPLIT = FinedeepConfig(num_sublayers=2, num_experts=2, expert_hidden=8)
EXPERTS = MoEConfig(
    num_experts=4, expert_hidden=8, shared_hidden=8, shared_combine="softmax", router=TopKConfig(num_selected=2)
)
LAYERS: tuple[SublayerConfig, ...] = (
    SHARED, SPLIT, VALUES, ParallelConfig(parts=(ATTENTION, EXPERTS)), PAIRS
)  # fmt: skip


def model_of(*layers: SublayerConfig, **changes: Any) -> DecoderConfig:
    stacks = (StackConfig(layers=layers, repeats=2),)
    return DecoderConfig(vocab_size=264, width=16, stacks=stacks, init_std=0.1, **changes)


def test_a_step_on_eight_devices_moves_every_parameter() -> None:
    config = RunConfig(
        batch_size=G, accumulation=1, steps=200, mesh=MeshConfig(data=2, fsdp=2, tensor=2, expert=2),
        optim=AdamWConfig(schedule=WarmupCosineConfig(warmup_steps=0)), model=model_of(*LAYERS, remat="full"),
    )  # fmt: skip
    check(config)
    mesh, model = axes.make_mesh(config.mesh), config.model.abstract()
    tx = make_optimizer(config, model)
    arrays = {name: value[None, :G] for name, value in grid.batch().items()}
    with jax.set_mesh(mesh):
        shardings = state_shardings(config, model, tx, mesh)
        state = create_state(config, tx, shardings)
        before = jax.device_get(state.params)
        placed = {name: jax.device_put(v, axes.sharding(mesh, BATCH_LOGICAL)) for name, v in arrays.items()}
        state, metrics = jit_step(config, model, tx, mesh, shardings)(state, placed)
    assert abs(float(metrics["loss/lm"]) - np.log(264)) < 0.7
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(state.params))
    for path, change in jax.tree_util.tree_leaves_with_path(moved):
        assert change > 0, f"{jax.tree_util.keystr(path)} did not move"


def test_text_is_the_same_as_without_caches() -> None:
    config = model_of(*LAYERS)
    params = jax.jit(lambda key: param.pure(config.build(key)))(jax.random.key(1))
    bias_LE = jnp.zeros((config.num_moe_layers, 4))
    model, prompt = config.abstract(), np.array([[5, 70, 9], [200, 3, 11]], np.int32)
    options: Any = {"num_tokens": 5, "temperature": 0.0, "top_p": 1.0, "eos": None, "step": 0, "key": jax.random.key(0)}
    found = np.asarray(generate(model, params, bias_LE, prompt, **options))
    whole = np.concatenate([prompt, found], axis=1)
    logits = jax.jit(lambda params, context: param.bind(model, params)(context, bias_LE)[0])(params, of(whole))
    np.testing.assert_array_equal(np.asarray(logits.argmax(axis=-1))[:, 2:-1], found)


def of(token_BS: np.ndarray) -> Context:
    B, S = token_BS.shape
    context = context_for(B, S, train=False)
    position_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    changes = {"token_BS": jnp.asarray(token_BS), "segment_BS": jnp.ones_like(position_BS), "position_BS": position_BS}
    return type(context)(**(vars(context) | changes))


def test_the_plan_counts_memories_as_experts_and_attention_experts_as_attention() -> None:
    D = 16
    memory = count(model_of(VALUES, PAIRS))
    slots = 2 * 3 * 36 * D  # two repeats, one table of values and two of PEER
    assert memory.experts == slots
    assert memory.total - memory.active == round(slots * (1 - 8 / 36))
    both = count(model_of(ParallelConfig(parts=(ATTENTION, EXPERTS))))
    assert both.attention == 2 * 2 * 4 * D * 2 * 8
    assert both.experts == 2 * 4 * 3 * D * 8
    assert both.total - both.active == both.experts / 2
    split = count(model_of(SPLIT))
    assert split.experts == 0 and split.active == split.total
