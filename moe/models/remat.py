"""What the backward pass recomputes: policies by name for the repeats of a stack (one pass through its pattern).

The forward pass keeps the input [B, S, D] of every repeat and what the policy names; the rest is computed again when
the gradient needs it. Every policy keeps the routers' outputs (`SAVED_NAME`), so that no recomputed layer can pick
other experts. What is kept beside them, per token and sublayer, in elements of `compute_dtype` (N query and M key-value
heads of width H, K experts a token):

    none                   everything
    dots                   results of products with weights: not attention's scores, nor the experts' products
    save_attention         queries, keys and values as they are scored, and the mixed values: (2 N + 2 M) H
    collectives            tokens as they arrive at their experts and results as they come back, about 2 K D: the
                           backward pass sends gradients alone, no activation a second time
    attention_collectives  both
    full                   nothing
    offload                nothing, and the input of every repeat waits in the host's memory

A name that a model does not use keeps nothing: `collectives` equals `full` where no dispatcher exchanges tokens.

Collectives: none of its own. Memory: `offload` needs the memory kind `pinned_host`; `moe.train.memory` refuses devices
without it. Source: Chen et al. 2016 (arXiv 1604.06174) for recomputation; Singh et al. 2023, TED (arXiv 2303.06318,
section 5.2) for saved collectives; Rajbhandari et al. 2021, ZeRO-Infinity (arXiv 2104.07857, section 5.1.2) for inputs
on the host. Differs from the papers: the unit is a repeat.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from moe.kernels.chunked import ATTENTION_NAME
from moe.routing.base import SAVED_NAME

Remat = Literal["none", "dots", "save_attention", "collectives", "attention_collectives", "full", "offload"]

COLLECTIVES = ("dispatched", "combined")
PICKED = "picked"
_INPUT = "repeat_input"
HOST = "pinned_host"
"""The memory kind that holds what is offloaded."""

_names = checkpoint_policies.save_only_these_names
_POLICIES: dict[str, Callable[..., Any]] = {
    "dots": checkpoint_policies.save_from_both_policies(
        checkpoint_policies.dots_with_no_batch_dims_saveable, _names(SAVED_NAME)
    ),
    "save_attention": _names(SAVED_NAME, ATTENTION_NAME),
    "collectives": _names(SAVED_NAME, *COLLECTIVES),
    "attention_collectives": _names(SAVED_NAME, ATTENTION_NAME, *COLLECTIVES),
    "full": _names(SAVED_NAME),
    "offload": checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[SAVED_NAME], names_which_can_be_offloaded=[_INPUT],
        offload_src="device", offload_dst=HOST,
    ),
}  # fmt: skip


def recomputed(
    body: Callable[[jax.Array, Any], Any], remat: str, stages: int | None = None
) -> Callable[[jax.Array, Any], Any]:
    """`body` (x_BSD, scanned) of a loop over repeats, with the policy applied; `stages`: that many run side by side."""
    if remat == "none":
        return body

    def named(x: jax.Array, scanned: Any) -> Any:
        return body(checkpoint_name(x, _INPUT), scanned)

    # Inside a scan nothing can be merged with the forward pass, so the barrier against that is not needed.
    return jax.checkpoint(named, policy=_policy(remat, stages), prevent_cse=False)


def picked_again(stage: Callable[..., Any], remat: str, stages: int) -> Callable[..., Any]:
    """`stage`, a loop over repeats, keeping what `remat` keeps of them; what is named PICKED is computed again."""
    keep: Any = checkpoint_policies.save_anything_except_these_names(PICKED)
    if remat != "none":
        inputs = () if remat == "offload" else (_INPUT,)  # the policy itself sees to them
        keep = checkpoint_policies.save_from_both_policies(_policy(remat, stages), _names(*inputs))
    return jax.checkpoint(stage, policy=keep, prevent_cse=False)


def _policy(remat: str, stages: int | None) -> Callable[..., Any]:
    if remat != "dots" or stages is None:
        return _POLICIES[remat]
    return checkpoint_policies.save_from_both_policies(_dots_of_stages(stages), _names(SAVED_NAME))


def _dots_of_stages(stages: int) -> Callable[..., bool]:
    """Products with weights of which every stage has its own: their one batch dimension is the stages'."""

    def policy(primitive: Any, *operands: Any, **parameters: Any) -> bool:
        if primitive is not jax.lax.dot_general_p:
            return False
        _, (batch, _) = parameters["dimension_numbers"]
        return len(batch) == 1 and operands[0].shape[batch[0]] == stages

    return policy
