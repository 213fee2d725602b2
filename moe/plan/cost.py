"""Seconds of one train step, term by term, from what the program computes, reads and sends.

    micro-batch = sublayers + logits, each  max(FLOPs / rate, bytes of HBM / bandwidth)
                + what no computation hides: rows to experts and back, tensor and context exchanges
                + max(0, weights gathered and gradients scattered - overlap * computation)
    step        = (A + stages - 1) / A * A micro-batches + update of the optimizer
    MFU         = model FLOPs / (devices * peak * step)

A micro-batch takes one forward pass, two for the backward pass, and another one of what the remat policy recomputes
(`moe.models.remat`): all but attention, all but the exchange of rows, and so on. The routed
experts' share is multiplied by the load-imbalance factor: the device with the most rows keeps the others waiting (a
buffer of fixed capacity computes its padding instead, and the factor is the capacity factor).

Seconds of collectives: `moe.plan.links`.

Source: Miao et al. 2022, Galvatron (arXiv 2211.13878, section 4) and https://github.com/PKU-DAIR/Hetu-Galvatron for the
terms. Differs from the paper: rates are a chip's data sheet times a stated efficiency instead of profiles; layouts are
uniform over layers; the terms of experts are new.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from moe.config import at_least
from moe.plan.chips import Chip
from moe.plan.flops import train_flops_per_token
from moe.plan.links import link
from moe.plan.traits import Trait, head_multiply_adds, rest, traits
from moe.plan.workload import ITEMSIZE, Workload, grid_of

_KEPT = {
    "none": {"dense", "attention", "experts", "exchange"},
    "dots": {"dense", "attention"},
    "save_attention": {"attention"},
    "collectives": {"exchange"},
    "attention_collectives": {"attention", "exchange"},
}
"""What is not done a second time under each remat policy; under all others everything is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the cost model takes for granted; it ranks layouts, it does not replace a profile."""

    efficiency: float = 0.6
    """Share of the peak that matrix products reach."""
    expert_efficiency: float = 0.45
    """The same for grouped products of experts."""
    overlap: float = 0.7
    """Share of the computation during which weights can be gathered and gradients scattered."""
    imbalance: float = 1.2
    """Rows of the busiest device of an expert group over the mean, where nothing is dropped."""
    latency: float = 5e-6
    """Seconds before the first byte of a collective arrives."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, imbalance=1, latency=0, overlap=0)
        for field in ("efficiency", "expert_efficiency"):
            if not 0 < getattr(self, field) <= 1:
                yield field, "must be above 0 and at most 1"


class Cost(NamedTuple):
    """Seconds of one optimizer step, by what they are spent on."""

    dense: float
    """Attention, dense MLPs, shared experts and logits: the larger of computing and reading."""
    experts: float
    weights: float
    """Gathering parameters and reducing gradients, as far as computation does not hide it."""
    tensor: float
    context: float
    exchange: float
    """Rows on their way to experts and back."""
    bubble: float
    update: float

    @property
    def step(self) -> float:
        return sum(self)


def cost(work: Workload, chip: Chip, assume: Assumptions | None = None) -> Cost:
    """Seconds of one step; every field is a sum over the A micro-batches."""
    return _Step(work, chip, assume or Assumptions()).cost()


def mfu(work: Workload, chip: Chip, seconds: float) -> float:
    """Model FLOPs over what the devices could have done in `seconds` a step."""
    done = train_flops_per_token(work.model, work.seq_len) * work.batch_size * work.seq_len
    return done / (seconds * work.devices * chip.flops)


class _Step:
    def __init__(self, work: Workload, chip: Chip, assume: Assumptions):
        self.work, self.chip, self.assume = work, chip, assume
        self.grid = grid_of(work.mesh, work.devices)
        self.itemsize = ITEMSIZE[work.model.compute_dtype]
        sizes = self.grid.sizes
        self.stages, self.cut_stream = sizes["stages"], self.grid.cut("batch", "stream")
        self.tokens = work.microbatch_tokens / self.cut_stream
        """Of the residual stream on one device."""
        strides = {"tensor": 1, "context": sizes["tensor"], "fsdp": sizes["tensor"] * sizes["context"]}
        strides["data"] = strides["fsdp"] * sizes["fsdp"]
        strides |= {"expert_tensor": 1, "expert": sizes["expert_tensor"]}
        self.links = {name: link(chip, work.devices, sizes[name], stride) for name, stride in strides.items()}
        self.embed = link(chip, work.devices, self.grid.pieces("embed"), sizes["tensor"])
        folded = sizes["expert"] * sizes["expert_tensor"]
        self.expert_embed = link(chip, work.devices, self.grid.pieces("expert_embed"), folded)

    def cost(self) -> Cost:
        model = self.work.model
        found = [(one, 1 / self.stages if one.repeats > 1 else 1.0) for one in traits(model, self.work.seq_len)]
        A = self.work.accumulation
        dense = experts = tensor = context = exchange = 0.0
        for one, share in found:
            times = one.repeats * share * A
            dense += times * self._dense(one)
            experts += times * self._experts(one)
            tensor += times * self._tensor(one)
            context += times * self._context(one)
            exchange += times * self._exchange(one)
        dense += A * self._roofline(head_multiply_adds(model) * 3, self.assume.efficiency, 0)
        weights = max(0.0, A * self._weights() - self.assume.overlap * (dense + experts))
        busy = dense + experts + tensor + context + exchange
        pipeline = getattr(model, "pipeline", None)
        idle = pipeline.bubble(self.stages) if pipeline is not None and self.stages > 1 else 0.0
        bubble = busy * idle / (1 - idle)
        held = sum(one.held(self.grid) for one in rest(model)) + sum(
            one.held(self.grid) for trait, _ in found for one in trait.weights
        )
        # The update reads parameter, gradient and two moments and writes three of them, 4 bytes each.
        update = 28 * held / self.chip.hbm_bandwidth
        return Cost(dense, experts, weights, tensor, context, exchange, bubble, update)

    def _roofline(self, multiply_adds: float, efficiency: float, read: float) -> float:
        """Seconds for products of the tokens of one device, or for the bytes that they read if that takes longer."""
        compute = 2 * multiply_adds * self.tokens / (efficiency * self.chip.flops)
        return max(compute, read / self.chip.hbm_bandwidth)

    def _dense(self, one: Trait) -> float:
        read = sum(w.gathered(self.grid) for w in one.weights if not w.routed) * self.itemsize
        moved = one.dense_multiply_adds / self.work.model.width * self.tokens * self.itemsize
        passes = 2 + self._forwards(_kind(one))
        return self._roofline(one.dense_multiply_adds * passes, self.assume.efficiency, (read + moved) * passes)

    def _experts(self, one: Trait) -> float:
        if not one.expert_multiply_adds:
            return 0.0
        factor = one.capacity_factor or (self.assume.imbalance if self.grid.sizes["expert"] > 1 else 1.0)
        read = sum(w.gathered(self.grid) for w in one.weights if w.routed) * self.itemsize
        passes = 2 + self._forwards("experts")
        products = one.expert_multiply_adds * factor * passes
        return self._roofline(products, self.assume.expert_efficiency, read * passes)

    def _forwards(self, kind: str) -> int:
        return forwards(self.work.model.remat, kind)

    def _weights(self) -> float:
        """Per micro-batch: compute-dtype weights gathered forward and backward, float32 gradients reduced."""
        total = 0.0
        latency = self.assume.latency
        for w, repeats in self._all_weights():
            link = self.expert_embed if w.routed else self.embed
            size = w.gathered(self.grid)
            total += repeats * (2 * link.gather(size * self.itemsize, latency) + link.gather(4 * size, latency))
            total += 2 * self.links["data"].gather(4 * repeats * w.held(self.grid) / max(w.repeats, 1), latency)
        return total

    def _all_weights(self) -> Iterator[tuple]:
        for one in traits(self.work.model, self.work.seq_len):
            times = one.repeats / self.stages if one.repeats > 1 else 1.0
            yield from ((w, times) for w in one.weights if math.prod(w.shape) >= self.work.model.width)
        yield from ((w, 1.0) for w in rest(self.work.model))

    def _tensor(self, one: Trait) -> float:
        """Tokens gathered before, and sums scattered behind, what heads or hidden widths cut: forward and backward."""
        if not any(w.cut_by_tensor for w in one.weights):
            return 0.0
        link = self.links["tensor"]
        whole = self.tokens * link.size * self.work.model.width * self.itemsize
        return 2 * (self._forwards(_kind(one)) + 1) * link.gather(whole, self.assume.latency)

    def _context(self, one: Trait) -> float:
        """Keys and values of all positions gathered, their gradients scattered."""
        link = self.links["context"]
        positions = self.tokens * self.links["tensor"].size * link.size
        whole = positions * one.kv_width / self.grid.pieces("kv_heads") * self.itemsize
        return (self._forwards("attention") + 2) * link.gather(whole, self.assume.latency)

    def _exchange(self, one: Trait) -> float:
        """Rows to experts and back, forward, backward and when recomputed; over expert_tensor they are gathered.

        Where no rows are sent, every device of the expert group gathers the tokens of all and scatters their sums.
        """
        if not one.rows_per_token:
            return 0.0
        token = self.work.model.width * self.itemsize
        slices, latency = self.links["expert_tensor"], self.assume.latency
        if one.sends_rows:
            sent = self.tokens * one.rows_per_token * min(one.budget or 1.0, self.grid.sizes["expert"]) * token
            once = self.links["expert"].all_to_all(sent, latency) + slices.gather(sent * slices.size, latency)
        else:
            ranks = self.links["expert"].size
            once = self.links["expert"].gather(self.tokens * ranks * token, latency)
            once += slices.gather(self.tokens * ranks * slices.size * token, latency)
        return 2 * (self._forwards("exchange") + 1) * once


def forwards(remat: str, kind: str) -> int:
    """Forward passes through what is named in `_KEPT`: 2 where the policy recomputes it."""
    return 1 if kind in _KEPT.get(remat, ()) else 2


def _kind(one: Trait) -> str:
    return "attention" if one.num_heads else "dense"


def fastest(work: Workload, chip: Chip, assume: Assumptions) -> float:
    """No more than `cost` says of any mesh: the products alone, perfectly balanced and never waiting."""
    remat, total = work.model.remat, 3 * head_multiply_adds(work.model) / assume.efficiency
    for one in traits(work.model, work.seq_len):
        dense = one.dense_multiply_adds * (2 + forwards(remat, _kind(one))) / assume.efficiency
        total += one.repeats * dense
        experts = one.expert_multiply_adds * (2 + forwards(remat, "experts")) / assume.expert_efficiency
        total += one.repeats * experts * (one.capacity_factor or 1.0)
    return 2 * total * work.batch_size * work.seq_len / work.devices / chip.flops
