"""Validation: held-out documents, domain by domain, in bits per byte.

    bits per byte = sum of nats over all predicted tokens / (ln 2 * bytes of the documents)

A router is asked as at the step that the parameters come from (its temperature may follow a schedule); noise that it
draws in evaluation too depends on a sequence's place in its domain, not on the size of a batch.

A document's end mark is predicted too and its nats count, so the number is a code length: comparable across
tokenizers and with a compressor's output on the same bytes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe import axes
from moe.balance import load
from moe.data import Corpus
from moe.models import Decoder
from moe.train.loss import Arrays, bias_of, forward, nats, real_targets
from moe.train.place import place
from moe.train.run import RunConfig
from moe.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainResult:
    """What was measured on one domain's held-out bytes. L counts MoE layers: zero of them for a dense model."""

    num_bytes: int
    num_tokens: int
    """Predicted tokens."""
    nats: float
    load_LE: np.ndarray
    """float32 [L, E] load per MoE layer; E is that of the widest layer."""
    frequency_LE: np.ndarray
    """float32 [L, E] share of the real tokens that take the expert: (1/T) sum_t 1[e in experts of t]; adds up to K."""
    chosen_prob_L: np.ndarray
    """float32 [L] mean over real tokens of the probability mass on the experts they take: at least K / E for top-k."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


class Measured(NamedTuple):
    """Sums over one batch of held-out text."""

    nats: jax.Array
    targets: jax.Array
    tokens_L: jax.Array
    """int32 [L] real tokens that were routed; a block that predicts further ahead sees fewer."""
    count_LE: jax.Array
    chosen_prob_L: jax.Array
    expert_LBR: jax.Array | None
    """Every assignment, if the evaluator keeps them and the layers have equally many; see `Statistics.expert_BR`."""
    token_LBR: jax.Array | None
    first_sequence: jax.Array | int = 0
    """Index, in its domain, of the batch's first sequence."""


Watch = Callable[[Measured, Arrays], None]


class Evaluator:
    """Evaluates parameters on the corpus's validation documents with one compiled function, `measure`."""

    def __init__(self, config: RunConfig, model: Decoder, corpus: Corpus, mesh: Mesh, *, keep_choices: bool = False):
        self._config, self._corpus = config, corpus
        self._sharding = axes.sharding(mesh, ("batch", None))

        def measure(
            params: Any, bias_LE: jax.Array, arrays: Arrays, step: jax.Array, first_sequence: jax.Array
        ) -> Measured:
            hidden_BSD, stats, _ = forward(
                model, params, arrays, bias_LE, step=step, key=jax.random.key(0), first_sequence=first_sequence,
                train=False, keep_choices=keep_choices,
            )  # fmt: skip
            real_BS = real_targets(arrays["segment_ids"])
            found = nats(model, params, hidden_BSD, arrays["tokens"][:, 1:], real_BS)
            if stats is None:
                none = jnp.zeros((0, 1), jnp.int32)
                return Measured(found, real_BS.sum(), none[:, 0], none, jnp.zeros((0,)), None, None, first_sequence)
            return Measured(
                found, real_BS.sum(), stats.tokens_B.sum(axis=1), stats.count_BE.sum(axis=1),
                stats.chosen_prob_B.sum(axis=1), stats.expert_BR, stats.token_BR, first_sequence,
            )  # fmt: skip

        self.measure = jax.jit(measure, out_shardings=axes.sharding(mesh, ()))
        self._bias = jax.jit(lambda states: bias_of(model, config.balance, states))

    def __call__(
        self, state: TrainState, max_bytes: int, begins: Callable[[str], None] = lambda domain: None
    ) -> dict[str, DomainResult]:
        """Results for every domain of the corpus, each on at most `max_bytes` bytes; `begins` hears of each."""
        return self.of(state.params, self._bias(state.balance), max_bytes, step=state.step, begins=begins)

    def of(
        self, params: Any, bias_LE: jax.Array, max_bytes: int, watch: Watch | None = None, *,
        step: jax.Array | np.int32, begins: Callable[[str], None] = lambda domain: None,
    ) -> dict[str, DomainResult]:  # fmt: skip
        """The same for parameters and bias that come from elsewhere, of `step`; `watch` sees every batch go by."""
        state = (params, bias_LE, step)
        found = {}
        for name in self._corpus.domains:
            begins(name)
            found[name] = self._domain(state, name, max_bytes, watch)
        return found

    def _domain(
        self, state: tuple[Any, jax.Array, Any], name: str, max_bytes: int, watch: Watch | None
    ) -> DomainResult:
        params, bias_LE, step = state
        held_out = self._corpus.validation(name, max_bytes)
        batch = self._config.microbatch_size
        found = []
        for index, arrays in enumerate(held_out.batches(batch, self._config.data.seq_len)):
            placed = place(arrays, self._sharding)
            measured = self.measure(params, bias_LE, placed, step, np.int32(index * batch))
            found.append(measured[:5])
            if watch is not None:
                watch(measured, placed)
        sums = (np.stack(column) for column in zip(*jax.device_get(found), strict=True))
        nats, targets, tokens, counts, chosen_prob = (column.astype(np.float64).sum(axis=0) for column in sums)
        return DomainResult(
            num_bytes=held_out.num_bytes,
            num_tokens=int(targets),
            nats=float(nats),
            load_LE=np.asarray(load(jnp.asarray(counts.astype(np.int32)))),
            frequency_LE=(counts / np.maximum(tokens, 1)[:, None]).astype(np.float32),
            chosen_prob_L=(chosen_prob / np.maximum(tokens, 1)).astype(np.float32),
        )


def mean_bits_per_byte(results: dict[str, DomainResult]) -> float:
    """Unweighted mean over domains."""
    return sum(result.bits_per_byte for result in results.values()) / len(results)
