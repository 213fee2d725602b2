"""The sections of a report that come from the final evaluation: which experts the held-out text takes."""

from pathlib import Path
from typing import Any

import numpy as np

from moe.analysis import plots_routing as draw
from moe.analysis.markdown import number, table
from moe.analysis.plots import Array, save_figure
from moe.analysis.run_files import RunFiles
from moe.analysis.specialisation import (
    conditional,
    dead_experts,
    domain_distance,
    hot_experts,
    hot_overlap,
    max_violation,
    normalised_entropy,
    pair_lift,
    pooled_load,
    top_experts,
)

_TOP_EXPERTS = 3
_TITLE = "Which experts each domain uses: stripes of its own, or white?"
PICTURES = ("routing.png", "topk_sum.png", "overlap.png", "pairs.png", "agreement.png")


def layer_numbers(run: RunFiles) -> list[dict[str, float]]:
    """A dict of specialisation numbers for every MoE layer; the load is pooled over domains by their tokens."""
    found, out = run.loads, []
    weights = {name: float(run.evaluation["domains"][name].get("tokens", 1)) for name in found}
    agreement = run.evaluation.get("choices", {}).get("agreement") or {}
    for index in range(len(run.layers)):
        one = {name: load_L[index][None] for name, load_L in found.items()}
        pooled = pooled_load(one, weights)
        numbers: dict[str, Any] = {
            "max_violation": max_violation(pooled),
            "entropy": normalised_entropy(pooled),
            "dead": dead_experts(pooled),
        }
        if len(found) > 1:
            numbers["domain_distance"] = domain_distance(one)
        out.append({key: value.item() for key, value in numbers.items()})
        if "kept" in agreement:
            out[-1]["agreement"] = agreement["kept"][index]
    return out


def specialisation(folder: Path, run: RunFiles) -> list[str]:
    """Load by domain as heat maps and tables."""
    found, layers, title = run.loads, run.layers, "## Specialisation"
    if run.unrouted:
        said = f"Left out, as some layer gave none of their tokens to an expert: {', '.join(run.unrouted)}."
        title = f"{title}\n\n{said}"
    if not found:
        return [title, "No load by domain: this run has no final evaluation, or its model has no MoE layer."]
    save_figure(
        folder / "routing.png",
        draw.heat_map_size(len(found), len(layers)),
        lambda figure: draw.draw_heat_maps(figure, found, layers, range(len(layers)), _TITLE),
    )
    header = ["layer", "max violation", "normalised entropy", "dead experts", "distance between domains"]
    keys = ["max_violation", "entropy", "dead", "domain_distance"]
    rows = [
        [str(layer), *(number(of.get(key)) for key in keys)]
        for layer, of in zip(layers, layer_numbers(run), strict=True)
    ]
    legend = (
        "Distance: the share of its assignments that a domain would have to move to use the experts as another domain "
        "does (total variation, mean over pairs): 0 = domains use the same experts, 1 = no expert in common. Dead: "
        "below 1 % of the even share. The other numbers are of the load over all domains, weighted by tokens."
    )
    favourites = [
        [str(layer), *(_favourites(load_L[index]) for load_L in found.values())] for index, layer in enumerate(layers)
    ]
    intro = "Most used experts, with load × number of experts (1 = even use):"
    image = "![expert by domain](routing.png)"
    body = [title, image, table(header, rows), legend, intro, table(["layer", *found], favourites)]
    return [*body, *_chosen_prob(folder, run), *_overlap(folder, run)]


def choices(folder: Path, run: RunFiles) -> list[str]:
    """Pairs of experts, and agreement with an earlier checkpoint; says why, where there is none."""
    if not run.loads:
        return []
    study = run.evaluation.get("choices")
    if study is None:
        return ["## Choices of single tokens", "Not studied: `python -m launch.evaluate WORKDIR --report` does."]
    if study["skipped"] is not None:
        return ["## Choices of single tokens", f"Not studied: {study['skipped']}."]
    return [*_pairs(folder, run), *_agreement(folder, run, study)]


def _chosen_prob(folder: Path, run: RunFiles) -> list[str]:
    by_domain = {
        name: np.array(domain["chosen_prob"])
        for name, domain in run.evaluation["domains"].items()
        if domain.get("chosen_prob")
    }
    frequency = run.by_expert("frequency")
    if not by_domain or not any(values.any() for values in by_domain.values()):
        return []
    some = next(iter(frequency.values()))
    floor_L = np.array([of.sum() / len(of) for of in some])
    save_figure(
        folder / "topk_sum.png",
        (11, 5.2),
        lambda figure: draw.draw_chosen_prob(figure.subplots(), by_domain, floor_L, run.layers),
    )
    rows = [
        [str(layer), number(float(floor_L[index])), *(number(float(values[index])) for values in by_domain.values())]
        for index, layer in enumerate(run.layers)
    ]
    return ["### Top-k sum", "![top-k sum](topk_sum.png)", table(["layer", "floor K / E", *by_domain], rows)]


def _overlap(folder: Path, run: RunFiles) -> list[str]:
    found = run.loads
    if len(found) < 2:
        return []
    hot = hot_experts(found)
    if not any(hot.values()):
        return ["### Busy experts", "No domain uses an expert of any layer twice as much as its even share."]
    overlap_DD = hot_overlap(hot)
    size = 4.5 + 0.55 * len(found)
    save_figure(
        folder / "overlap.png",
        (max(size + 2.5, 10.0), max(size, 5.0)),
        lambda figure: draw.draw_overlap(figure, list(found), overlap_DD, [len(experts) for experts in hot.values()]),
    )
    legend = (
        "Busy: at least twice the even share of the domain's assignments. Diagonal: how many of "
        f"{sum(len(load_E) for load_E in next(iter(found.values())))} (all layers) are busy. Elsewhere: experts busy "
        "in both domains / experts busy in either."
    )
    return ["### Busy experts", "![busy experts that domains share](overlap.png)", legend]


def _pairs(folder: Path, run: RunFiles) -> list[str]:
    title = "## Experts that serve the same tokens"
    if run.pairs_LEE is None:
        return [title, "Not drawn: `pairs.npz` is missing."]
    widths = [len(load_E) for load_E in next(iter(run.loads.values()))]
    pairs_L = [pairs[:E, :E] for pairs, E in zip(run.pairs_LEE, widths, strict=True)]
    if not any((pairs - np.diag(np.diag(pairs))).any() for pairs in pairs_L):
        return [title, "None: every token takes one expert."]
    lift_L = [pair_lift(pairs) for pairs in pairs_L]
    rows, columns = draw.pair_grid(len(widths))
    save_figure(
        folder / "pairs.png",
        (2.5 + columns * (4.2 if columns <= 3 else 3.0), 1.2 + rows * (4.2 if columns <= 3 else 3.2)),
        lambda figure: draw.draw_pairs(figure, lift_L, run.layers),
    )
    header = ["layer", "pair most often together", "times its loads say", "share of the first's tokens"]
    best = [
        [str(layer), *_best_pair(pairs, lift)] for layer, pairs, lift in zip(run.layers, pairs_L, lift_L, strict=True)
    ]
    legend = (
        "1 = as often together as the loads alone say, given that a token takes no expert twice. Pairs of which fewer "
        "than 10 tokens are expected are left out."
    )
    return [title, "![pairs of experts](pairs.png)", legend, table(header, best)]


def _best_pair(pairs_EE: Array, lift_EE: Array) -> list[str]:
    if np.isnan(lift_EE).all():
        return ["–", "–", "–"]
    first, second = (int(i) for i in np.unravel_index(np.nanargmax(lift_EE), lift_EE.shape))
    return [f"{first}, {second}", f"{lift_EE[first, second]:.2f}", f"{conditional(pairs_EE)[first, second]:.1%}"]


def _agreement(folder: Path, run: RunFiles, study: dict[str, Any]) -> list[str]:
    title = "## Agreement of routing between checkpoints"
    agreement = study["agreement"]
    if agreement is None:
        return [title, "Not measured: no checkpoint before this one is saved."]
    heading = f"Same held-out tokens at step {study['against']} and at step {run.evaluation['step']}"
    save_figure(
        folder / "agreement.png",
        (11, 5.2),
        lambda figure: draw.draw_agreement(figure.subplots(), agreement, run.layers, heading),
    )
    header = ["layer", "assignments kept", "common / all experts of a token", "kept by chance"]
    rows = [
        [str(layer), *(number(agreement[key][index]) for key in ("kept", "jaccard", "chance"))]
        for index, layer in enumerate(run.layers)
    ]
    legend = f"{heading}; 1 = the routing did not change. Churn is 1 minus the share kept."
    return [title, "![agreement of routing](agreement.png)", legend, table(header, rows)]


def _favourites(load_E: Array) -> str:
    best = top_experts(load_E[None], _TOP_EXPERTS)[0]
    return ", ".join(f"{expert} ({load_E[expert] * len(load_E):.1f})" for expert in best)
