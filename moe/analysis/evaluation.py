"""The final evaluation of a run, beside what compressors make of the same bytes: `evaluation.json`."""

import json
from pathlib import Path
from typing import Any

import jax

from moe import axes
from moe.analysis.baselines import bits_per_byte
from moe.data import Corpus, prepare
from moe.models.layout import MOE
from moe.plan.parameters import count
from moe.train.evaluate import DomainResult, Evaluator
from moe.train.load import load
from moe.train.metrics import JSONL_NAME, read_metrics
from moe.train.run import RunConfig

FILE_NAME = "evaluation.json"


def evaluate_run(workdir: Path, *, step: int | None = None, max_bytes: int | None = None) -> dict[str, Any]:
    """Evaluates a run's newest checkpoint (or `step`) on one device; writes `evaluation.json` and returns it."""
    run = load(workdir, step)
    config = run.config
    corpus = prepare(config.data)
    mesh = axes.make_mesh(axes.MeshConfig(), jax.local_devices()[:1])
    limit = config.evaluate.final_max_bytes if max_bytes is None else max_bytes
    with jax.set_mesh(mesh):
        results = Evaluator(config, run.model, corpus, mesh).of(run.params, run.bias_LE, limit)
    found = describe(workdir, config, run.step, corpus, results, limit)
    partial = workdir / f"{FILE_NAME}.partial"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(workdir / FILE_NAME)
    return found


def describe(
    workdir: Path, config: RunConfig, step: int, corpus: Corpus, results: dict[str, DomainResult], max_bytes: int
) -> dict[str, Any]:
    """The content of `evaluation.json`: per domain nats, bits per byte, load, and the baselines on the same bytes."""
    parameters = count(config.model)
    history = read_metrics(workdir / JSONL_NAME)
    domains = {}
    for name, result in results.items():
        text = corpus.validation(name, max_bytes).text_bytes
        domains[name] = {
            "bytes": result.num_bytes,
            "tokens": result.num_tokens,
            "nats": result.nats,
            "bits_per_byte": result.bits_per_byte,
            "load": result.load_LE.tolist(),
        } | bits_per_byte(text)
    return {
        "step": step,
        "seed": config.seed,
        "parameters": {"total": parameters.total, "active": parameters.active},
        "seconds": sum(record["time/step_s"] for record in history),
        "domains": domains,
        "mean_bits_per_byte": sum(found["bits_per_byte"] for found in domains.values()) / len(domains),
        "load_layers": [index for index, kind in enumerate(config.model.kinds) if kind == MOE],
    }
