"""Where the compiled model holds its activations and what it sends: the residual stream cut over context and tensor,
parameters gathered layer by layer over fsdp and context alone, their gradients summed over all that cut tokens."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes, param
from moe.axes import MeshConfig
from moe.layers.attention import AttentionConfig
from moe.models import DecoderConfig
from moe.plan.collectives import Collective, axes_name, collectives
from moe.plan.hlo import Program
from moe.train.loss import forward

B, S, D, F, L, V, N, M, H = 8, 32, 96, 320, 3, 208, 4, 2, 20
CONFIG = DecoderConfig(
    vocab_size=V, width=D, num_layers=L, moe=None, mlp_hidden=F, tie_embeddings=False,
    attention=AttentionConfig(num_heads=N, num_kv_heads=M, head_width=H),
)  # fmt: skip
HYBRID = {"data": 2, "fsdp": 2, "tensor": 2}
CONTEXT = {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}


@functools.cache
def compiled(sizes: tuple[tuple[str, int], ...]) -> tuple[Program, list[Collective]]:
    mesh = axes.make_mesh(MeshConfig(**dict(sizes)), jax.devices())
    model = CONFIG.abstract()
    shardings = param.shardings(model, mesh)
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), param.pure(model), shardings
    )
    cut = axes.sharding(mesh, ("batch",))
    names = ("tokens", "segment_ids", "positions", "domains")
    arrays = {name: jax.ShapeDtypeStruct((B, S + 1), np.int32, sharding=cut) for name in names}

    def loss(params: dict[str, jax.Array], arrays: dict[str, jax.Array]) -> jax.Array:
        found = forward(model, params, arrays, jnp.zeros((0, 1)), step=jnp.int32(0), key=jax.random.key(0), train=True)
        real_BS = arrays["segment_ids"][:, 1:] > 0
        return param.bind(model, params).nats(found.hidden_BSD, arrays["tokens"][:, 1:], real_BS)

    with jax.set_mesh(mesh):
        program = Program(jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, arrays).compile().as_text())
    return program, collectives(program, mesh.shape)


def sent(sizes: dict[str, int], kind: str, over: str) -> Counter[tuple[int, int]]:
    """(elements, times) of the collectives of this kind over these axes."""
    mesh = axes.make_mesh(MeshConfig(**sizes), jax.devices()).shape
    found = compiled(tuple(sizes.items()))[1]
    wanted = [
        one for one in found if one.kind == kind and axes_name(one.axes, mesh) == over and one.array.dtype == "f32"
    ]
    return Counter((one.array.elements, one.times) for one in wanted)


def layer_weights(tensor: int) -> Counter[tuple[int, int]]:
    """Of one layer what a device needs of each matrix, cut over tensor alone; once for each layer."""
    heads, kv, mlp = D * N * H // tensor, D * M * H // tensor, D * F // tensor
    return Counter({(heads, L): 2, (kv, L): 2, (mlp, L): 3})


@pytest.mark.parametrize(("sizes", "storage"), [(HYBRID, "fsdp"), (CONTEXT, "fsdp+context")])
def test_parameters_are_gathered_layer_by_layer_over_the_axes_that_store_them(
    sizes: dict[str, int], storage: str
) -> None:
    found = sent(sizes, "all-gather", storage)
    vocabulary = (V * D // 2, 1)
    assert found.pop(vocabulary) in (2, 3)  # embedding and head; XLA may gather the head again for the backward pass
    assert found == layer_weights(2) + layer_weights(2)
    gathers = [one for one in compiled(tuple(sizes.items()))[1] if one.kind == "all-gather"]
    assert not {"data"} & {axis for one in gathers for axis in one.axes}


def test_gradients_are_summed_over_shards_and_replicas_once() -> None:
    mesh = axes.make_mesh(MeshConfig(**HYBRID), jax.devices()).shape
    matrices = layer_weights(2)
    found: Counter[tuple[int, int]] = Counter()
    for one in compiled(tuple(HYBRID.items()))[1]:
        over = set(axes_name(one.axes, mesh).split("+"))
        if one.kind in ("all-reduce", "reduce-scatter") and "data" in over:
            assert "tensor" not in over
            found[one.array.elements, one.times] += 1
    assert {size: count for size, count in found.items() if size in matrices} == matrices
    # Beside them the vocabulary's matrices (or a shard of one), gains and the loss cross replicas: no activation does.
    assert {size for size, _ in found} <= {size for size, _ in matrices} | {V * D // 2, V * D // 4, D, 1}


@pytest.mark.parametrize("sizes", [HYBRID, CONTEXT], ids=str)
def test_norms_and_what_the_backward_pass_keeps_are_cut_over_context_and_tensor(sizes: dict[str, int]) -> None:
    program, _ = compiled(tuple(sizes.items()))
    context, batch = sizes.get("context", 1), B // (sizes["data"] * sizes["fsdp"])
    held = {"cut": (L, batch, S // (2 * context), D), "whole": (L, batch, S // context, D)}
    norms, kept = set(), set()
    for one in program.executed():
        for array in one.instruction.arrays:
            kept |= {name for name, shape in held.items() if array.dims == shape}
            if one.instruction.op == "rsqrt":
                norms.add(int(array.elements))
    assert norms == {batch * S // (2 * context)}
    assert kept == {"cut"}


@pytest.mark.parametrize("sizes", [HYBRID, CONTEXT], ids=str)
def test_only_inputs_and_outputs_of_products_cross_the_tensor_axis(sizes: dict[str, int]) -> None:
    context, batch = sizes.get("context", 1), B // (sizes["data"] * sizes["fsdp"])
    stream = batch * S // context * D
    gathered = sent(sizes, "all-gather", "tensor")
    # Forward: input of attention and of the MLP; backward: these again, and the gradients of both outputs.
    assert gathered[stream, L] == 2 + 2 + 2
    assert max(size for size, _ in gathered) == stream
    # CPU: an all-reduce, of which every device keeps its positions. Backward: gradients of q, k, v and of gate, up.
    summed = sent(sizes, "all-reduce", "tensor")
    assert summed[stream, L] == 2 + 3 + 2


def test_keys_and_values_are_gathered_over_context_and_queries_are_not() -> None:
    batch = B // 2
    gathered = sent(CONTEXT, "all-gather", "context")
    assert gathered == Counter({(batch * S * M // 2 * H, L): 2})
