"""Validation: held-out documents, domain by domain, in bits per byte.

    bits per byte = sum of nats over all predicted tokens / (ln 2 * bytes of the documents)

A document's end mark is predicted too and its nats count, so the number is a code length: comparable across
tokenizers and with a compressor's output on the same bytes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe import axes
from moe.balance import load
from moe.data import Corpus
from moe.models import Decoder
from moe.train.loss import Arrays, bias_of, forward, real_targets, token_losses
from moe.train.place import place
from moe.train.run import RunConfig
from moe.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainResult:
    """What was measured on one domain's held-out bytes."""

    num_bytes: int
    num_tokens: int
    nats: float
    load_LE: np.ndarray
    """float32 [L, E] load per MoE layer; zero layers for a dense model."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


class Evaluator:
    """Evaluates parameters on the corpus's validation documents with one compiled function."""

    def __init__(self, config: RunConfig, model: Decoder, corpus: Corpus, mesh: Mesh):
        self._config, self._corpus = config, corpus
        self._sharding = axes.sharding(mesh, ("batch", "position"))

        def measure(params: Any, bias_LE: jax.Array, arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
            key = jax.random.key(0)
            logits, stats = forward(model, params, arrays, bias_LE, step=jnp.int32(0), key=key, train=False)
            real_BS = real_targets(arrays["segment_ids"])
            nats = jnp.where(real_BS, token_losses(logits, arrays["tokens"][:, 1:]), 0.0).sum()
            counts = stats.count_BE.sum(axis=1) if stats is not None else jnp.zeros((0, 1), jnp.int32)
            return nats, real_BS.sum(), counts

        self._measure = jax.jit(measure, out_shardings=axes.sharding(mesh, ()))
        self._bias = jax.jit(lambda states: bias_of(model, config.balance, states))

    def __call__(self, state: TrainState, max_bytes: int) -> dict[str, DomainResult]:
        """Results for every domain of the corpus, each on at most `max_bytes` held-out bytes."""
        return self.of(state.params, self._bias(state.balance), max_bytes)

    def of(self, params: Any, bias_LE: jax.Array, max_bytes: int) -> dict[str, DomainResult]:
        """The same for parameters and expert bias that come from elsewhere."""
        return {name: self._domain(params, bias_LE, name, max_bytes) for name in self._corpus.domains}

    def _domain(self, params: Any, bias_LE: jax.Array, name: str, max_bytes: int) -> DomainResult:
        held_out = self._corpus.validation(name, max_bytes)
        batch = self._config.microbatch_size
        found = []
        for arrays in held_out.batches(batch, self._config.data.seq_len):
            found.append(self._measure(params, bias_LE, place(arrays, self._sharding)))
        nats, tokens, counts = (np.stack(column) for column in zip(*jax.device_get(found), strict=True))
        return DomainResult(
            num_bytes=held_out.num_bytes,
            num_tokens=int(tokens.sum()),
            nats=float(nats.astype(np.float64).sum()),
            load_LE=np.asarray(load(counts.sum(axis=0))),
        )


def mean_bits_per_byte(results: dict[str, DomainResult]) -> float:
    """Unweighted mean over domains."""
    return sum(result.bits_per_byte for result in results.values()) / len(results)
