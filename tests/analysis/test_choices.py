"""Single tokens' choices: pairs of experts and agreement between checkpoints, against loops and by hand."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from moe.analysis.choices import ChoiceStudy, compare, count_pairs
from moe.train.evaluate import Measured

L, B, S, K, E = 2, 2, 5, 2, 4
WIDTHS = np.array([4, 3])  # the second layer has three experts: 3 and 4 are void there


def made(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(expert, token) [L, B, R]: every token takes two experts; the last token of every sequence is padding."""
    rng = np.random.default_rng(seed)
    expert = np.stack([rng.permuted(np.tile(np.arange(width), (B, S, 1)), axis=2)[..., :K] for width in WIDTHS])
    expert[:, :, -1] = WIDTHS[:, None, None]  # void: the layer's own number of experts
    token = np.broadcast_to(np.arange(S)[:, None], (L, B, S, K))
    return expert.reshape(L, B, S * K).astype(np.int32), token.reshape(L, B, S * K).astype(np.int32)


def sets(expert: np.ndarray, token: np.ndarray, layer: int) -> list[set[int]]:
    """The experts of every token of a layer."""
    found: list[set[int]] = [set() for _ in range(B * S)]
    for b in range(B):
        for e, t in zip(expert[layer, b], token[layer, b], strict=True):
            if e < WIDTHS[layer]:
                found[b * S + t].add(int(e))
    return found


def test_pairs_are_those_of_a_loop_over_tokens() -> None:
    expert, token = made()
    found = np.asarray(count_pairs(expert, token, jnp.asarray(WIDTHS), E, S))
    for layer in range(L):
        expected = np.zeros((E, E))
        for chosen in sets(expert, token, layer):
            for e in chosen:
                for f in chosen:
                    expected[e, f] += 1
        np.testing.assert_array_equal(found[layer], expected)
        assert np.trace(expected) == B * (S - 1) * K


def test_agreement_is_that_of_a_loop_over_tokens() -> None:
    (a, token), (b, _) = made(0), made(1)
    found = np.asarray(compare((a, token, b, token), jnp.asarray(WIDTHS), E, S))
    for layer in range(L):
        pairs = list(zip(sets(a, token, layer), sets(b, token, layer), strict=True))
        both = sum(len(x & y) for x, y in pairs)
        jaccard = sum(len(x & y) / len(x | y) for x, y in pairs if x | y)
        np.testing.assert_allclose(found[layer], [both, 16, jaccard, 8], rtol=1e-6)
        assert both < 16


class Replay(NamedTuple):
    """Stands in for an evaluator: `measure` gives what it was handed as parameters."""

    def measure(self, params: Any, bias: Any, arrays: Any, step: Any, first_sequence: Any) -> Measured:
        return params


ARRAYS = {"tokens": jnp.zeros((1, 5), jnp.int32)}


def measured(expert: Any, token: Any = ((0, 0, 1, 1, 2, 2, 3, 3),)) -> Measured:
    """One sequence of four tokens with two experts each of four."""
    count = jnp.bincount(jnp.asarray(expert[0]), length=E)[None]
    zero = jnp.zeros(())
    return Measured(
        zero, zero, jnp.array([4]), count, zero[None], jnp.asarray(expert, jnp.int32)[None], jnp.asarray(token)[None]
    )


NOW = measured([[0, 1, 0, 1, 2, 3, 0, 2]])
THEN = measured([[1, 0, 0, 2, 0, 1, 0, 2]])  # the same in another order; one of two; none; the same


def test_a_checkpoint_agrees_with_itself_entirely() -> None:
    study = ChoiceStudy(Replay(), np.array([E]), (NOW, jnp.zeros(()), 0))  # type: ignore[arg-type]
    study(NOW, ARRAYS)
    found = study.agreement()
    assert found is not None and found.kept_L.tolist() == found.jaccard_L.tolist() == [1.0]


def test_a_partial_agreement_is_that_made_by_hand() -> None:
    study = ChoiceStudy(Replay(), np.array([E]), (THEN, jnp.zeros(()), 0))  # type: ignore[arg-type]
    for _ in range(2):  # two batches add up
        study(NOW, ARRAYS)
    found = study.agreement()
    assert found is not None
    # |A and B| = 2, 1, 0, 2 of 8 assignments; jaccard = 1, 1/3, 0, 1. Loads 3 2 2 1 and 4 2 2 0 over T = 4 tokens:
    # (3 * 4 + 2 * 2 + 2 * 2) / (4 * 8) by chance.
    np.testing.assert_allclose(found.kept_L, [5 / 8])
    np.testing.assert_allclose(found.jaccard_L, [7 / 12], rtol=1e-6)
    np.testing.assert_allclose(found.chance_L, [20 / 32])
    assert study.pairs_LEE[0].tolist() == [[6, 4, 2, 0], [4, 4, 0, 0], [2, 0, 4, 2], [0, 0, 2, 2]]


@pytest.mark.parametrize(
    ("widths", "change", "reason"),
    [
        ([], {}, "no MoE layer"),
        ([E], {"expert_LBR": None, "token_LBR": None}, "do not all keep equally many"),
        ([E], {"token_LBR": None}, "mixtures of tokens"),
    ],
)
def test_what_cannot_be_studied_is_said(widths: list[int], change: dict[str, Any], reason: str) -> None:
    study = ChoiceStudy(Replay(), np.array(widths, int), (THEN, jnp.zeros(()), 0))  # type: ignore[arg-type]
    study(NOW._replace(**change), ARRAYS)
    assert study.skipped is not None and reason in study.skipped and study.agreement() is None


def test_without_another_checkpoint_there_are_pairs_and_no_agreement() -> None:
    study = ChoiceStudy(Replay(), np.array([E]), None)  # type: ignore[arg-type]
    study(NOW, ARRAYS)
    assert study.agreement() is None and study.skipped is None and study.pairs_LEE.sum() == 16
