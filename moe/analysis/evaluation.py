"""The final evaluation of a run, beside what compressors make of the same bytes: `evaluation.json`.

With it, if asked for, a study of every held-out token's choice of experts (`moe.analysis.choices`): pairs of experts in
`pairs.npz` (int64 `pairs` [L, E, E]), and the agreement with the choices of an earlier checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe import axes
from moe.analysis.baselines import bits_per_byte
from moe.analysis.choices import ChoiceStudy
from moe.config import ConfigError
from moe.data import Corpus, prepare
from moe.plan.parameters import count
from moe.train.evaluate import DomainResult, Evaluator
from moe.train.load import load
from moe.train.metrics import JSONL_NAME, read_metrics
from moe.train.run import RunConfig
from moe.train.saved import saved_steps
from moe.train.session import readable

FILE_NAME = "evaluation.json"
PAIRS_NAME = "pairs.npz"


def evaluate_run(
    workdir: Path, *, step: int | None = None, max_bytes: int | None = None, study: bool = True,
    against: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates a run's newest checkpoint (or `step`) on one device; writes `evaluation.json` and returns it.

    `study` looks at every token's choice too, and compares it with that of the checkpoint `against` (by default the
    newest one before; with none, the entry `agreement` says so). Raises ConfigError for a step that is not saved.
    """
    saved = saved_steps(workdir)
    for name, wanted in (("step", step), ("against", against)):
        if wanted is not None and wanted not in saved:
            raise ConfigError(f"{name} = {wanted}: is not among the saved steps {saved} of '{workdir}'")
    run = load(workdir, step)
    config = run.config
    earlier = [other for other in saved if other < run.step]
    against = earlier[-1] if against is None and earlier else against
    corpus = readable(lambda: prepare(config.data))()
    mesh = axes.make_mesh(axes.MeshConfig(), jax.local_devices()[:1])
    limit = config.evaluate.final_max_bytes if max_bytes is None else max_bytes
    with jax.set_mesh(mesh):
        evaluator = Evaluator(config, run.model, corpus, mesh, keep_choices=study)
        watch = None
        if study:
            then = load(workdir, against) if against is not None else None
            other = (then.params, then.bias_LE, then.step) if then is not None else None
            watch = ChoiceStudy(evaluator, config.model.exists_LE.sum(axis=1), other)
        results = evaluator.of(run.params, run.bias_LE, limit, watch, step=np.int32(run.step))
    found = describe(workdir, config, run.step, corpus, results, limit)
    (workdir / PAIRS_NAME).unlink(missing_ok=True)
    if watch is not None:
        found["choices"] = _choices(watch, against)
        if watch.skipped is None:
            np.savez_compressed(workdir / PAIRS_NAME, pairs=watch.pairs_LEE)
    partial = workdir / f"{FILE_NAME}.partial"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(workdir / FILE_NAME)
    return found


def describe(
    workdir: Path, config: RunConfig, step: int, corpus: Corpus, results: dict[str, DomainResult], max_bytes: int
) -> dict[str, Any]:
    """The content of `evaluation.json`: per domain nats, bits per byte, routing, and the baselines on the same bytes.

    Lists by layer and expert are as wide as the widest layer; `num_experts` says how many experts each layer has.
    """
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
            "frequency": result.frequency_LE.tolist(),
            "chosen_prob": result.chosen_prob_L.tolist(),
        } | bits_per_byte(text)
    return {
        "step": step,
        "seed": config.seed,
        "parameters": {"total": parameters.total, "active": parameters.active},
        "seconds": sum(record["time/step_s"] for record in history),
        "domains": domains,
        "mean_bits_per_byte": sum(found["bits_per_byte"] for found in domains.values()) / len(domains),
        "load_layers": list(config.model.moe_layers),
        "num_experts": config.model.exists_LE.sum(axis=1).tolist(),
    }


def _choices(study: ChoiceStudy, against: int | None) -> dict[str, Any]:
    """`skipped`: why there is no study, or None; `agreement`: with the checkpoint `against`, or None."""
    found: dict[str, Any] = {"skipped": study.skipped, "against": against, "agreement": None}
    if (agreement := study.agreement()) is not None:
        found["agreement"] = {
            "kept": agreement.kept_L.tolist(),
            "jaccard": agreement.jaccard_L.tolist(),
            "chance": agreement.chance_L.tolist(),
        }
    return found
