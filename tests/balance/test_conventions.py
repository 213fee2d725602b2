"""Converted coefficients against each codebase's own formula, written out here in numpy.

Guards against: coefficients that differ by K between codebases (OLMoE #45), Megatron's data-parallel degree in the
gradient of the global loss (#3672), OLMoE's z-loss divided by K.
"""

import numpy as np
import pytest

from moe.balance.conventions import from_ours, to_ours

L, T, E, K = 3, 12, 4, 2
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 1.5, (T, E))
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=-1, keepdims=True)
CHOSEN = np.argsort(-LOGITS, axis=-1)
THEIRS = 0.02


def hits(K: int) -> np.ndarray:
    """[T, E] 1 where the token takes the expert."""
    return (CHOSEN[:, :K, None] == np.arange(E)).sum(axis=1)


def ours(coefficient: float, K: int = K) -> float:
    """L layers with the same routing."""
    n = hits(K).sum(axis=0)
    return coefficient * L * E * float((n / n.sum()) @ PROBS.mean(axis=0))


def ours_z(coefficient: float) -> float:
    return coefficient * L * float(np.mean(np.log(np.exp(LOGITS).sum(axis=-1)) ** 2))


def megatron_aux() -> float:
    n, prob_sum = hits(K).sum(axis=0), PROBS.sum(axis=0)
    return L * E * THEIRS / (K * T**2) * float((prob_sum * n).sum())


def megatron_z() -> float:
    return sum(THEIRS * float(np.mean(np.log(np.exp(LOGITS).sum(axis=-1)) ** 2)) for _ in range(L))


def olmoe() -> float:
    scale = E / (L * T * K)
    return THEIRS * scale * sum(float(hits(K).sum(axis=0) @ PROBS.mean(axis=0)) for _ in range(L))


def olmoe_z() -> float:
    return THEIRS * sum(float((np.log(np.exp(LOGITS).sum(axis=-1)) ** 2).sum()) for _ in range(L)) / (L * T * K)


def hf() -> float:
    """All layers' logits in one row: expert_mask [L T, K, E] and router_prob [L T, E] averaged over all of it."""
    mask = np.tile(CHOSEN[:, :K, None] == np.arange(E), (L, 1, 1)).astype(float)
    return THEIRS * E * float((mask.mean(axis=0) * np.tile(PROBS, (L, 1)).mean(axis=0)).sum())


def maxtext() -> float:
    """Two sequences of equal length would be averaged; here there is one."""
    density, density_prob = hits(K)[None].mean(axis=1), PROBS[None].mean(axis=1)
    return float(np.mean([np.mean(density * density_prob) * E**2 * THEIRS for _ in range(L)]))


def switch() -> float:
    return sum(THEIRS * E * float((hits(1).mean(axis=0) * PROBS.mean(axis=0)).sum()) for _ in range(L))


FORMULAS = {
    "ours": lambda: ours(THEIRS), "megatron_aux": megatron_aux, "megatron_seq": megatron_aux, "olmoe": olmoe, "hf": hf,
    "maxtext": maxtext, "flaxformer": maxtext,
}  # fmt: skip


@pytest.mark.parametrize("convention", FORMULAS)
def test_the_converted_coefficient_gives_the_same_loss(convention: str) -> None:
    converted = to_ours(convention, THEIRS, num_selected=K, num_layers=L)
    np.testing.assert_allclose(ours(converted), FORMULAS[convention](), rtol=1e-12)


@pytest.mark.parametrize("convention", ["switch", "deepspeed"])
def test_conventions_of_one_expert_a_token_are_ours(convention: str) -> None:
    np.testing.assert_allclose(ours(to_ours(convention, THEIRS, num_selected=1, num_layers=L), K=1), switch())


@pytest.mark.parametrize(("convention", "formula"), [("megatron_z", megatron_z), ("olmoe_z", olmoe_z)])
def test_the_converted_z_loss_is_the_same(convention: str, formula: object) -> None:
    converted = to_ours(convention, THEIRS, num_selected=K, num_layers=L)
    np.testing.assert_allclose(ours_z(converted), formula(), rtol=1e-12)


def test_the_gradient_of_megatrons_global_loss_is_converted_and_not_its_log() -> None:
    """Each of D ranks holds T / D tokens; f is of all, P a local sum over T; ranks' gradients are averaged."""
    D = 4
    f = hits(K).sum(axis=0) / (K * T)
    slope_of_rank = THEIRS * E * f / T  # d loss_rank / d p_t of one of its own tokens
    slope_of_step = slope_of_rank / D
    converted = to_ours("megatron_global", THEIRS, num_selected=K, num_layers=L, data_parallel=D)
    np.testing.assert_allclose(converted * E * f / T, slope_of_step)
    assert to_ours("megatron_global", THEIRS, num_selected=K, num_layers=L) == THEIRS


def test_published_coefficients_by_hand() -> None:
    """OLMoE: 0.01 over 16 layers is 6.25e-4 a layer; its z-loss of 0.001 with 8 choices is 7.8e-6."""
    assert to_ours("olmoe", 0.01, num_selected=8, num_layers=16) == pytest.approx(6.25e-4)
    assert to_ours("olmoe_z", 0.001, num_selected=8, num_layers=16) == pytest.approx(7.8125e-6)
    assert to_ours("hf", 0.01, num_selected=8, num_layers=16) == pytest.approx(0.005)
    assert to_ours("maxtext", 0.01, num_selected=2, num_layers=32) == pytest.approx(6.25e-4)


@pytest.mark.parametrize("convention", [*FORMULAS, "megatron_global", "megatron_z", "olmoe_z", "deepspeed"])
def test_there_and_back_is_where_it_was(convention: str) -> None:
    sizes = {"num_selected": 2, "num_layers": 7, "data_parallel": 16}
    assert from_ours(convention, to_ours(convention, 0.3, **sizes), **sizes) == pytest.approx(0.3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="convention 'fairseq' is not one of ours, megatron_aux"):
        to_ours("fairseq", 0.01, num_selected=1, num_layers=1)
    with pytest.raises(ValueError, match="num_selected = 2: must be 1 in the convention 'switch'"):
        to_ours("switch", 0.01, num_selected=2, num_layers=1)
    with pytest.raises(ValueError, match="num_layers = 0"):
        from_ours("olmoe", 0.01, num_selected=2, num_layers=0)
