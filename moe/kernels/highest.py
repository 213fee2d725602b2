"""The highest of a batch of scores, found where the batch lies.

Left to itself XLA's partitioner gathers the scores of the whole batch on every device for `jax.lax.top_k` (seen in the
compiled program, jax 0.10.2 and 0.12.0); a `shard_map` keeps every token where it is. And XLA on CPU
finds its fast selection only if nothing but one slice reads the sorted scores: else it sorts them whole, which made a
step of 1,024 tokens and 64 experts 12 % slower. The barrier keeps what callers do with the result out of its sight.
"""

import jax

from moe.axes import mesh_in_use, per_device, spec


def highest(
    scores: jax.Array, count: int, axes: tuple[str | None, ...] = ("batch", "stream")
) -> tuple[jax.Array, jax.Array]:
    """scores [B, S, ..., N] -> (values, int32 indices) [B, S, ..., count], falling; of equals the lower index first.

    `axes` names the logical axes of the first dimensions; those of `moe.axes` that cut them must divide their sizes.
    The values carry gradient. Collectives: none for scores that are cut like the residual stream.
    """

    def local(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, index = jax.lax.top_k(scores, count)
        # One barrier each: XLA's decomposition of top-k aborts on one around the pair (jax 0.10.2, several devices).
        return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(index)

    if not mesh_in_use():
        return local(scores)
    cut = spec(axes)
    return per_device(local, cut, (cut, cut))(scores)
