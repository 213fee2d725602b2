"""Attention by chunks, gathered and in a ring, against all scores at once; values and gradients."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import axes
from moe.axes import MeshConfig
from moe.config import ConfigError, check
from moe.kernels.attend import AttendConfig, attend
from moe.kernels.chunked import ATTENTION_NAME
from moe.kernels.ring import from_zigzag, gather_pairs, ring_pairs, to_zigzag, zigzag_routes
from moe.layers.attention import AttentionConfig
from moe.models import DecoderConfig
from moe.train.run import RunConfig
from tests.collectives import Sent, collectives

B, S, N, M, H, V = 4, 48, 4, 2, 6, 10
SCALE = 0.4
WHOLE = AttendConfig()
GATHER, RING = (AttendConfig(method=method, chunk=2) for method in ("gather", "ring"))  # type: ignore[arg-type]
Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]


def inputs(sequences: int = B) -> Inputs:
    rng = np.random.default_rng(0)
    shapes = ((sequences, S, N, H), (sequences, S, M, H), (sequences, S, M, V))
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)  # type: ignore[return-value]


def segments(sequences: int = B) -> np.ndarray:
    """One document; documents that cross every border; one token each, nearly; padding at the end and alone."""
    one = np.ones(S, np.int32)
    crossing = np.repeat(np.arange(1, 8), 7)[:S]
    short = np.arange(S) // 2 + 1
    padded = np.where(np.arange(S) < 31, np.arange(S) // 20 + 1, 0)
    return np.stack([one, crossing, short, padded] * (sequences // 4)).astype(np.int32)


def by_loop(query: np.ndarray, key: np.ndarray, value: np.ndarray, segment: np.ndarray) -> np.ndarray:
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, s, n in np.ndindex(query.shape[:3]):
        seen = [t for t in range(s + 1) if segment[b, t] == segment[b, s]]
        m = n // (N // M)
        share = np.exp(SCALE * key[b, seen, m].astype(np.float64) @ query[b, s, n])
        out[b, s, n] = share / share.sum() @ value[b, seen, m]
    return out


def loss(parts: Any, segment: jax.Array, config: AttendConfig) -> tuple[jax.Array, jax.Array]:
    y = attend(*parts, segment, config, SCALE)
    return (y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y


@functools.partial(jax.jit, static_argnums=2)
def step(parts: Any, segment: jax.Array, config: AttendConfig) -> Any:
    return jax.value_and_grad(loss, has_aux=True)(parts, segment, config)


@functools.cache
def expected() -> Any:
    return jax.device_get(step(inputs(), segments(), WHOLE))


def close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    config = MeshConfig(**({"data": 1} | sizes))
    return axes.make_mesh(config, jax.devices()[: config.num_devices])


def test_all_scores_at_once_equal_a_loop_over_heads_and_positions() -> None:
    (_, y), _ = expected()
    np.testing.assert_allclose(y, by_loop(*inputs(), segments()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 16, 512])
def test_chunks_of_any_size_give_the_same_values_and_gradients(chunk: int) -> None:
    close(step(inputs(), segments(), AttendConfig(method="gather", chunk=chunk)), expected())


LAYOUTS: list[dict[str, int]] = [
    {"context": 2}, {"context": 3}, {"context": 4, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2, "expert": 4},
    {"fsdp": 4},
]  # fmt: skip


@pytest.mark.parametrize("config", [WHOLE, GATHER, RING], ids=lambda config: config.method)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_positions_cut_over_devices_give_the_same_values_and_gradients(
    sizes: dict[str, int], config: AttendConfig
) -> None:
    with jax.set_mesh(mesh_of(**sizes)):
        close(step(inputs(), segments(), config), expected())


def test_keys_and_values_of_one_width_and_low_precision_stay_close() -> None:
    query, key, value = inputs()
    parts = tuple(x.astype(jnp.bfloat16) for x in (query, key, value[..., :H]))
    exact = step((query, key, value[..., :H]), segments(), WHOLE)
    with jax.set_mesh(mesh_of(context=2)):
        found = step(parts, segments(), RING)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((found[0][1], found[1])))
    for a, b in zip(jax.tree.leaves((found[0][1], found[1])), jax.tree.leaves((exact[0][1], exact[1])), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 0.02 * np.linalg.norm(b)


def test_hidden_keys_do_not_leak_through_large_scores() -> None:
    query, key, value = inputs()
    segment = segments()
    key[:, 24:] *= 1e3  # late keys would win every softmax that saw them
    changed = value.copy()
    changed[:, 24:] += 7.0
    with jax.set_mesh(mesh_of(context=2)):
        for config in (GATHER, RING):
            ((_, before), _), ((_, after), _) = (step((query, key, v), segment, config) for v in (value, changed))
            np.testing.assert_array_equal(before[:, :24], after[:, :24])
            assert bool(jnp.isfinite(before).all()) and not np.array_equal(before[:, 24:], after[:, 24:])


@pytest.mark.parametrize("per_piece", [1, 2, 3])
@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_every_device_has_the_same_work_in_every_step_and_each_causal_pair_is_met_once(n: int, per_piece: int) -> None:
    chunks = 2 * n * per_piece
    causal = {(q, k) for q in range(chunks) for k in range(q + 1)}
    seen, work = [], np.zeros((n, n), int)
    for device in range(n):
        own = [p * per_piece + a for p in (device, 2 * n - 1 - device) for a in range(per_piece)]
        for met in range(n):
            source = (device - met) % n
            theirs = [p * per_piece + a for p in (source, 2 * n - 1 - source) for a in range(per_piece)]
            pairs = np.asarray(ring_pairs(device, met if met == 0 else jnp.int32(met), n, per_piece))
            assert all((own[a], theirs[b]) == (q, k) for a, b, q, k in pairs)
            seen += [(q, k) for _, _, q, k in pairs.tolist()]
            work[device, met] = len(pairs)
    assert len(seen) == len(causal) and set(seen) == causal
    np.testing.assert_array_equal(work, np.broadcast_to(work[0], (n, n)))
    np.testing.assert_array_equal(work[:, 1:], 2 * per_piece**2)

    gathered = gather_pairs(n, per_piece)  # a rectangular array: the same number of pairs on every device
    assert {(q, k) for _, _, q, k in gathered.reshape(-1, 4).tolist()} == causal
    assert gathered.shape[0] * gathered.shape[1] == len(causal) and (gathered[..., 1] == gathered[..., 3]).all()


@pytest.mark.parametrize("n", [2, 3, 8])
def test_zigzag_puts_an_early_and_a_late_piece_on_every_device_and_comes_back(n: int) -> None:
    for routes in zigzag_routes(n):
        assert sorted(source for source, _ in routes) == sorted(to for _, to in routes) == list(range(n))
    position = jnp.arange(4 * n)[None]
    with jax.set_mesh(mesh_of(context=n)):
        cut = axes.spec((None, "position"))
        there = jax.jit(jax.shard_map(to_zigzag, in_specs=cut, out_specs=cut))(position)
        back = jax.jit(jax.shard_map(from_zigzag, in_specs=cut, out_specs=cut))(there)
    pieces = np.asarray(position).reshape(2 * n, 2)
    np.testing.assert_array_equal(there[0], np.concatenate([pieces[[i, 2 * n - 1 - i]].ravel() for i in range(n)]))
    np.testing.assert_array_equal(back, position)


@functools.cache
def program(config: AttendConfig, context: int, longer: int = 1) -> str:
    parts, segment = (jax.tree.map(lambda x: np.concatenate([x] * longer, axis=1), x) for x in (inputs(), segments()))
    with jax.set_mesh(mesh_of(context=context)):
        return step.lower(parts, segment, config).compile().as_text()


def test_a_ring_sends_what_its_documentation_says() -> None:
    n = 4
    s = S // n
    found = collectives(program(RING, n))
    sent = sum(
        count * one.times * int(one.array.split()[1])
        for one, count in found.items()
        if one.kind == "collective-permute"
    )
    query, key, value, output = (B * s * width for width in (N * H, M * H, M * V, N * V))
    zigzag = query + key + value + output  # two halves of each, forward
    around = (n - 1) * (key + value)
    gradients = n * (key + value)
    # Backward: the exchange of all four once more, keys and values around again, their gradients with them. Here both
    # passes are one piece of program, and XLA sends what is the same in both, the first step of keys and values, once.
    assert sent == 2 * zigzag + 2 * around - (key + value) + gradients
    assert not any(one.kind == "all-gather" for one in found)


def test_gathering_sends_keys_and_values_once_each_way() -> None:
    found: dict[Sent, int] = collectives(program(GATHER, 4))
    gathered = [one for one in found.elements() if one.kind == "all-gather"]  # type: ignore[attr-defined]
    assert sorted(one.array for one in gathered) == sorted((f"f32 {B * S * M * H}", f"f32 {B * S * M * V}"))


@pytest.mark.parametrize("context", [1, 4])
def test_no_array_of_the_program_grows_with_the_square_of_the_length(context: int) -> None:
    length = 4 * S

    def largest(config: AttendConfig) -> int:
        arrays = re.findall(r"f32\[([\d,]+)\]", program(config, context, 4))
        return max(int(np.prod([int(size) for size in dims.split(",")])) for dims in arrays)

    scores, linear = B * N * length * length // context, 2 * B * length * N * V
    assert largest(WHOLE) >= scores > 2 * linear
    assert largest(RING) <= linear and largest(GATHER) <= linear


def test_a_length_that_does_not_cut_is_refused() -> None:
    parts = inputs()
    said = (
        r"^attend.method = 'ring': .* 2 pieces for each of mesh.context = 5, so its length 48 must be divisible by 10$"
    )
    with jax.set_mesh(mesh_of(context=5)), pytest.raises(ConfigError, match=said):
        attend(*parts, jnp.asarray(segments()), AttendConfig(method="ring"), SCALE)
    said = r"^attend.chunk = 5: must divide the 48 positions of a piece: one of 1 of a sequence of 48$"
    with pytest.raises(ConfigError, match=said):
        attend(*parts, jnp.asarray(segments()), AttendConfig(method="gather", chunk=5), SCALE)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (AttendConfig(chunk=64), "chunk = 64: is ignored, as method='whole' has no chunks; leave it at 512"),
        (AttendConfig(method="ring", chunk=0), "chunk = 0: must be at least 1"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config: AttendConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check(config)


@pytest.mark.parametrize(("config", "loops"), [(GATHER, 1), (RING, 2)], ids=["gather", "ring"])
def test_a_remat_policy_can_keep_what_the_backward_pass_reads_of_attention(config: AttendConfig, loops: int) -> None:
    """Forward, backward and, unless its results are kept, forward once more: each so many loops over pairs."""

    def total(*names: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = jax.checkpoint(lambda parts: loss(parts, jnp.asarray(segments()), config)[0], policy=policy)
        return jax.jit(jax.value_and_grad(layer)).lower(inputs()).as_text().count("stablehlo.while")

    with jax.set_mesh(mesh_of(context=2)):
        assert (total(), total(ATTENTION_NAME)) == (3 * loops, 2 * loops)


@pytest.mark.parametrize(
    ("config", "seq_len", "said"),
    [
        (RING, 36, "model.attention.attend.method = 'ring': cuts a sequence into 2 pieces for each .* divisible by 8"),
        (GATHER, 40, "model.attention.attend.chunk = 2: must divide the 5 positions of a piece: one of 8 .* of 40"),
        (WHOLE, 38, "data.seq_len = 38: must be divisible by context [*] tensor = 4, which cut the residual stream"),
    ],
)
def test_a_run_whose_sequences_do_not_cut_is_refused(config: AttendConfig, seq_len: int, said: str) -> None:
    model = DecoderConfig(attention=AttentionConfig(attend=config))
    data = dataclasses.replace(RunConfig().data, seq_len=seq_len)
    with pytest.raises(ConfigError, match=f"^{said}$"):
        check(RunConfig(model=model, data=data, mesh=MeshConfig(context=4)))
