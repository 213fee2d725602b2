"""A run folder with made-up metrics and evaluation, for drawing reports of."""

import json
from pathlib import Path

import numpy as np

from moe.train.metrics import MetricWriter

DOMAINS = ("code", "english", "tables", "headers", "names")
LAYERS, EXPERTS, STEPS = (1, 2, 3), 16, 600
HELD_OUT = {"code": 1.21, "english": 1.83, "tables": 0.92, "headers": 0.74, "names": 2.35}


PICTURES = {"overview", "baselines", "training", "load", "histogram", "router", "routing", "topk_sum", "overlap"}
PICTURES |= {"pairs", "agreement"}
BINS = (0.0, 0.01, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0)


def make_run(workdir: Path, steps: int = STEPS, moe: bool = True, evaluated: bool = True) -> Path:
    """Writes what a training run leaves behind: metrics, evaluation and config."""
    rng = np.random.default_rng(0)
    with MetricWriter(workdir, resume_step=0) as writer:
        for step in range(1, steps + 1):
            writer.write(step, training_record(rng, step, moe, evaluated and step % 100 == 0))
    router = {"type": "somewhere.mine:OwnRouterConfig", "num_selected": 2, "init_std": 0.5}
    config = {"type": "configs.toy:RunConfig", "steps": steps, "model": {"stacks": [{"layers": [{"router": router}]}]}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "run.json").write_text(json.dumps({"starts": [{}, {"balance": {"even": "by exact, one pass more"}}]}))
    if evaluated:
        (workdir / "evaluation.json").write_text(json.dumps(final_evaluation(rng, steps, moe)))
    if evaluated and moe:
        np.savez_compressed(workdir / "pairs.npz", pairs=made_pairs(rng, len(LAYERS), EXPERTS))
    return workdir


def made_pairs(rng: np.random.Generator, layers: int, experts: int) -> np.ndarray:
    """Pairs [L, E, E] of tokens with two experts each, three times as often of the same parity as not."""
    same = (np.arange(experts)[:, None] + np.arange(experts)) % 2 == 0
    pairs = np.triu(rng.poisson(np.where(same, 45, 15), (layers, experts, experts)), 1)
    pairs = pairs + pairs.swapaxes(1, 2)
    return pairs + np.eye(experts, dtype=int) * pairs.sum(axis=2)[:, None]


def training_record(rng: np.random.Generator, step: int, moe: bool, evaluated: bool) -> dict:
    decay = float(np.exp(-step / 90))
    loss = 1.45 + 4.0 * decay + 0.06 * rng.standard_normal()
    record = {"loss": loss + 0.01, "loss/lm": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 8192 * step}
    record |= {"time/step_s": 0.1, "time/tokens_per_s": 81920.0 + step % 7}
    if moe:
        violation = np.array([0.35, 0.55, 0.8]) + 3 * decay + 0.08 * rng.random(3)
        record |= {"load/max_violation": violation, "load/entropy": 0.99 - 0.06 * violation}
        record |= {"load/max_violation_micro": violation + 0.3, "load/idle_max": [0, 3, max(0, 200 - step)]}
        record |= {"router/chosen_prob": [0.2, 0.3, 0.4], "router/margin": [0.01, 0.02, 0.04]}
        record |= {"balance/expert_bias/range": [0.1 * step / 600, 0.2, 0.3]}
        record |= {f"load/histogram/from_{low:g}": [int(low == 0.8) * 10 + 1, 2, 2] for low in BINS}
        record |= {"load/dead": [0, 0, int(step < 60)], "load/dropped": 0.02 * violation, "loss/load_balance": 0.01}
    if evaluated:
        by_domain = {name: value * (1 + 2 * decay) for name, value in HELD_OUT.items()}
        record["eval/bits_per_byte"] = float(np.mean(list(by_domain.values())))
        record |= {f"eval/bits_per_byte/{name}": value for name, value in by_domain.items()}
    return record


def final_evaluation(rng: np.random.Generator, step: int, moe: bool) -> dict:
    unigram = {"code": 4.72, "english": 4.31, "tables": 3.55, "headers": 4.95, "names": 4.12}
    domains = {}
    for index, (name, value) in enumerate(HELD_OUT.items()):
        domain = {"bytes": 52_000 + index, "tokens": 13_000 + index, "nats": 0.69 * value * 52_000}
        domain |= {"bits_per_byte": value, "unigram": unigram[name]}
        domain |= {"gzip": 0.55 * unigram[name], "xz": 0.5 * unigram[name]}
        if moe:
            taste = np.array([(np.arange(EXPERTS) * 7 + layer) % EXPERTS % 5 == index for layer in LAYERS])
            load = rng.dirichlet(np.full(EXPERTS, 6.0), len(LAYERS)) + taste * np.array([0.03, 0.1, 0.2])[:, None]
            domain["load"] = (load / load.sum(axis=1, keepdims=True)).tolist()
            domain["frequency"] = (2 * load / load.sum(axis=1, keepdims=True)).tolist()
            domain["chosen_prob"] = [0.15 + 0.02 * index, 0.2, 0.3]
        domains[name] = domain
    return {
        "step": step,
        "seed": 7,
        "parameters": {"total": 12_345_678, "active": 3_456_789},
        "seconds": 123.5,
        "domains": domains,
        "mean_bits_per_byte": float(np.mean(list(HELD_OUT.values()))),
        "load_layers": list(LAYERS) if moe else [],
        "num_experts": [EXPERTS] * len(LAYERS) if moe else [],
        "choices": {"skipped": None if moe else "the model has no MoE layer", "against": 500, "agreement": AGREEMENT},
    }


AGREEMENT = {"kept": [0.9, 0.8, 0.7], "jaccard": [0.85, 0.7, 0.6], "chance": [0.2, 0.15, 0.15]}


def make_large(workdir: Path, layers: int, experts: int) -> None:
    """A run with many layers, the last of them with half the experts of the others and even load."""
    make_run(workdir, steps=20)
    rng, half = np.random.default_rng(1), experts // 2
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    for index, domain in enumerate(evaluation["domains"].values()):
        load = rng.dirichlet(np.ones(experts), layers)
        load[:-1, 10 * index : 10 * index + 4] += 0.1
        load /= load.sum(axis=1, keepdims=True)
        load[-1] = np.where(np.arange(experts) < half, 1 / half, 0)
        domain |= {"load": load.tolist(), "frequency": (8 * load).tolist()}
        domain["chosen_prob"] = (0.2 + 0.01 * index + 0.01 * np.arange(layers)).tolist()
    agreement = {key: np.linspace(value[0], value[2], layers).tolist() for key, value in AGREEMENT.items()}
    evaluation |= {"load_layers": list(range(layers)), "num_experts": [experts] * (layers - 1) + [half]}
    evaluation["choices"] |= {"agreement": agreement}
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    pairs = made_pairs(rng, layers, experts)
    pairs[-1] = 0
    pairs[-1, :half, :half] = made_pairs(rng, 1, half)[0]
    np.savez_compressed(workdir / "pairs.npz", pairs=pairs)
