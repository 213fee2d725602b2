"""How evenly experts are used, and how differently the domains use them; numpy over arrays of load.

`load_LE[l, e]` is the fraction of the assignments of MoE layer l that went to expert e; it sums to 1 over e.
`load_DLE` is a dict from the name of a domain to such an array. Every number is per layer, shape [L]. Layers of
different numbers of experts are asked one by one, as [1, E]; `load_DL` is a dict to a list of [E_l], one a layer.

Source: Qiu et al. 2025 (arXiv 2501.11873), section on specialisation, for the busy experts that domains share.
Differs from the paper: which experts count as busy, and the number for the overlap, are ours.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# An expert is dead below 1 % of the even share 1/E: it then gets so few tokens that its weights hardly move, while
# the plain noise of a balanced router stays above it (1 % of the share is 9.9 standard deviations down already for
# an expert that expects 100 assignments).
DEAD_SHARE = 0.01
# The paper on specialisation speaks of experts above 0.2 where the even share is 0.0625; ours need twice theirs.
HOT_SHARE = 2.0


def max_violation(load_LE: ArrayLike) -> Array:
    """`E max_e load_e - 1`: 0 for even load, E - 1 when one expert takes all. MaxVio of arXiv:2408.15664."""
    load = _checked(load_LE)
    return load.shape[-1] * load.max(axis=-1) - 1.0


def normalised_entropy(load_LE: ArrayLike) -> Array:
    """`-sum_e load_e ln load_e / ln E`, with 0 ln 0 = 0: 1 for even load, 0 for one expert; 1 when E = 1."""
    load = _checked(load_LE)
    if load.shape[-1] == 1:
        return np.ones(load.shape[:-1])
    logs = np.log(load, where=load > 0, out=np.zeros_like(load))
    return np.sum(load * -logs, axis=-1) / np.log(load.shape[-1])


def dead_experts(load_LE: ArrayLike) -> NDArray[np.int64]:
    """The number of experts with `load_e < 1 / (100 E)`, that is below 1 % (`DEAD_SHARE`) of the even share."""
    load = _checked(load_LE)
    return np.sum(load < DEAD_SHARE / load.shape[-1], axis=-1)


def domain_distance(load_DLE: Mapping[str, ArrayLike]) -> Array:
    """Mean over the pairs of domains of the total variation `1/2 sum_e |load_a,e - load_b,e|`.

    The number that says whether domains use different experts: 0 when all use them alike, 1 when no two domains share
    an expert. It is the share of its assignments that a domain would have to move to look like another one. Finite
    samples keep it above 0: two domains of n independent assignments each over the same even load are
    `sqrt(E / (pi n))` apart. Raises ValueError for fewer than two domains.
    """
    loads = list(_same_shape(load_DLE).values())
    if len(loads) < 2:
        raise ValueError(f"load_DLE has {len(loads)} domains: a distance needs at least 2")
    return np.mean([0.5 * np.abs(a - b).sum(axis=-1) for a, b in combinations(loads, 2)], axis=0)


def pooled_load(load_DLE: Mapping[str, ArrayLike], weight_D: Mapping[str, float]) -> Array:
    """`sum_d weight_d load_d / sum_d weight_d`, shape [L, E]: the load over all domains, weighted by their tokens."""
    loads = _same_shape(load_DLE)
    return np.average(list(loads.values()), axis=0, weights=[weight_D[name] for name in loads])


def top_experts(load_LE: ArrayLike, count: int) -> NDArray[np.int64]:
    """The `count` most used experts of each layer, the most used first, ties by index; shape [L, min(count, E)]."""
    return np.argsort(-_checked(load_LE), axis=-1, kind="stable")[..., :count]


def hot_experts(load_DL: Mapping[str, Sequence[ArrayLike]]) -> dict[str, set[tuple[int, int]]]:
    """(layer, expert) of every domain's busy experts: load at least `HOT_SHARE` = 2 times the even share 1 / E."""
    found = {}
    for name, load_L in load_DL.items():
        loads = [np.asarray(load_E, np.float64) for load_E in load_L]
        found[name] = {
            (layer, int(expert))
            for layer, load_E in enumerate(loads)
            for expert in np.flatnonzero(load_E * len(load_E) >= HOT_SHARE)
        }
    return found


def hot_overlap(hot: Mapping[str, set[tuple[int, int]]]) -> Array:
    """`|H_a and H_b| / |H_a or H_b|` for every pair of domains, shape [D, D]; nan where neither has a busy expert."""
    either = [[len(a | b) for b in hot.values()] for a in hot.values()]
    both = [[len(a & b) for b in hot.values()] for a in hot.values()]
    return np.where(np.array(either) > 0, np.array(both) / np.maximum(either, 1), np.nan)


def pair_lift(pairs_EE: ArrayLike, *, rarest: float = 10.0) -> Array:
    """How much oftener two experts of one layer serve the same token than their loads alone say, shape [E, E].

        lift_ef = pairs_ef / expected_ef,   expected_ef = N n_e n_f / sum_{a != b} n_a n_b   (e != f)

    with n_e = pairs_ee the tokens of an expert and N = sum_{e != f} pairs_ef. A token never takes an expert twice, so
    the plain n_e n_f / T of independence is too large (for even load its lift would be (K - 1) E / (K (E - 1)) < 1
    for every pair); `expected` is scaled to the pairs there are. nan on the diagonal and where fewer than `rarest`
    tokens are expected: of so few no ratio means anything.
    """
    pairs = np.asarray(pairs_EE, np.float64)
    n_E, other = np.diag(pairs), ~np.eye(len(pairs), dtype=bool)
    by_chance = np.outer(n_E, n_E) * other
    expected = by_chance * (pairs[other].sum() / max(by_chance.sum(), 1.0))
    return np.where(other & (expected >= rarest), pairs / np.where(expected > 0, expected, 1.0), np.nan)


def conditional(pairs_EE: ArrayLike) -> Array:
    """P(f | e) = pairs_ef / n_e: of the tokens of expert e the share that f serves too; 0 for an expert of none."""
    pairs = np.asarray(pairs_EE, np.float64)
    return pairs / np.maximum(np.diag(pairs), 1.0)[:, None]


def chain(likeness_EE: ArrayLike) -> list[int]:
    """The experts in an order that puts those next to each other that are alike: each time the best at either end."""
    likeness = np.nan_to_num(np.asarray(likeness_EE, np.float64), nan=0.0, posinf=10.0, neginf=-10.0)
    left = set(range(len(likeness)))
    first = int(np.where(np.eye(len(likeness), dtype=bool), -np.inf, likeness).max(axis=1).argmax())
    order = [first]
    left.remove(first)
    while left:
        end, expert = max(
            ((end, expert) for end in (0, -1) for expert in sorted(left)),
            key=lambda pair: likeness[order[pair[0]], pair[1]],
        )
        order = [expert, *order] if end == 0 else [*order, expert]
        left.remove(expert)
    return order


def _checked(load_LE: ArrayLike) -> Array:
    load = np.asarray(load_LE, np.float64)
    if load.ndim != 2 or load.size == 0:
        raise ValueError(f"load has shape {load.shape}: must be [layers, experts]")
    sums = load.sum(axis=-1)
    if not (np.all(load >= 0) and np.all(np.abs(sums - 1.0) < 1e-3)):  # float32 sums of 1e3 experts stay below 1e-4
        raise ValueError(f"load sums to {sums.tolist()} over experts: must be >= 0 and sum to 1 in every layer")
    return load


def _same_shape(load_DLE: Mapping[str, ArrayLike]) -> dict[str, Array]:
    loads = {name: _checked(load) for name, load in load_DLE.items()}
    if len({load.shape for load in loads.values()}) > 1:
        raise ValueError(f"loads differ in shape: { ({name: load.shape for name, load in loads.items()}) }")
    return loads
