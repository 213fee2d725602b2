"""Coefficients of the load-balance loss and the z-loss in other codebases' conventions, into ours and back.

Ours: coefficient * sum over layers of E sum_i f_i P_i, f summing to 1 (1 at balance), or of mean logsumexp^2. Below,
L layers with experts, K choices a token, and of each layer: n_i assignments of expert i among T tokens (f_i = n_i /
(K T)), P_i the mean probability.

    ours, megatron_aux, megatron_seq, megatron_z
                     coefficient E / (K T^2) sum_i n_i sum_t p_ti, or mean_t logsumexp^2, summed over layers: equal
    megatron_global  the same in the log, but its gradient is divided by the data-parallel degree (issue 3672)
    olmoe            (MegaBlocks) coefficient E / (L T K) sum_layers sum_i n_i P_i: ours = theirs / L
    olmoe_z          coefficient / (L T K) sum_layers sum_t logsumexp^2: ours = theirs / (L K)
    hf               (Mixtral, Qwen, OLMoE) coefficient E sum_i (n_i / T) P_i with n, P and T of all layers' tokens
                     together; at balance K, not K L. ours = theirs K / L
    maxtext          coefficient E^2 mean_i (n_i / T) P_i, mean over layers: ours = theirs K / L
    flaxformer       (T5X) the same formula over groups of its own, mean over layers: ours = theirs K / L
    switch           coefficient E sum_i (n_i / T) P_i with K = 1, summed over layers: equal
    deepspeed        coefficient E sum_i (c_i / T) P_i, c_i counting first choices alone, summed over layers: equal

A number cannot carry over what f is counted over. The scope that goes with each: megatron_aux, olmoe, hf, switch,
deepspeed: the micro-batch of one rank (an n). megatron_seq, maxtext: 'sequence'. megatron_global: 'global' with
accumulation='buffer'. hf pools the layers: equal to ours where all layers have the same load, else close.
deepspeed with K > 1 counts other assignments than ours. For megatron_global the converted coefficient has the same
gradient, and a log that differs by the data-parallel degree.
Source: the public code of each, as of 2026; OLMoE: Muennighoff et al. 2024 (arXiv 2409.02060). Differs from the
papers: they seldom say which of these they mean.
"""

from typing import Literal, get_args

Convention = Literal[
    "ours", "megatron_aux", "megatron_seq", "megatron_global", "megatron_z", "olmoe", "olmoe_z", "hf", "maxtext",
    "flaxformer", "switch", "deepspeed",
]  # fmt: skip


def to_ours(
    convention: Convention, coefficient: float, *, num_selected: int, num_layers: int, data_parallel: int = 1
) -> float:
    """Our `coefficient` for theirs; `num_layers` counts those with experts, `data_parallel` is for megatron_global."""
    return coefficient * _factor(convention, num_selected, num_layers, data_parallel)


def from_ours(
    convention: Convention, coefficient: float, *, num_selected: int, num_layers: int, data_parallel: int = 1
) -> float:
    """Their coefficient for our `coefficient`: the inverse of `to_ours`."""
    return coefficient / _factor(convention, num_selected, num_layers, data_parallel)


def _factor(convention: Convention, K: int, L: int, data_parallel: int) -> float:
    """What theirs is multiplied by. Raises ValueError for an unknown name and for sizes that cannot be."""
    if convention not in get_args(Convention):
        raise ValueError(f"convention {convention!r} is not one of {', '.join(get_args(Convention))}")
    if min(K, L, data_parallel) < 1:
        raise ValueError(f"num_selected = {K}, num_layers = {L} and data_parallel = {data_parallel} must be at least 1")
    if convention == "switch" and K != 1:
        raise ValueError(f"num_selected = {K}: must be 1 in the convention 'switch'; with more it is 'flaxformer'")
    if convention == "megatron_global":
        return 1 / data_parallel
    if convention == "olmoe":
        return 1 / L
    if convention == "olmoe_z":
        return 1 / (L * K)
    if convention in ("hf", "maxtext", "flaxformer"):
        return K / L
    return 1.0
