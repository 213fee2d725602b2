"""Bytes that one layer takes on a device: what its forward pass keeps, and what its backward pass holds at its worst.

Every coefficient is a tensor of the compiled program: read off buffer assignments of libtpu 0.0.42, at the moment when
most is held.
"""

from typing import Any

from moe.plan.traits import Trait, traits
from moe.plan.workload import ITEMSIZE, Workload, grid_of


class Layers:
    """The layers of a workload on one device."""

    def __init__(self, work: Workload):
        self.work, self.model, self.grid = work, work.model, grid_of(work.mesh, work.devices)
        self.itemsize = ITEMSIZE[work.model.compute_dtype]
        self.sizes = self.grid.sizes
        pipeline: Any = getattr(work.model, "pipeline", None)
        stages = self.sizes["stages"]
        self.microbatches = pipeline.microbatches if pipeline is not None and stages > 1 else 1
        rounds = pipeline.rounds if pipeline is not None and stages > 1 else 1
        items = rounds * self.microbatches
        self.iterations = items + stages - 1
        self.excess = self.iterations / items
        """Over the items that are needed: an idle stage computes and keeps all the same."""
        self.batch_tokens = work.microbatch_tokens / self.grid.cut("batch", "stream")
        self.tokens = self.batch_tokens / self.microbatches
        """Of the residual stream that one layer works on at a time."""
        self.whole = self.tokens * self.sizes["tensor"]
        """The same where sublayers gather positions over tensor."""
        self.found = traits(work.model, work.seq_len)

    def kept(self, one: Trait) -> float:
        """Of one repeat; the tensors that `moe.models.remat` names for each policy."""
        policy, (query, kv, mixed) = self.model.remat, self._heads(one)
        if policy == "none":
            return self._everything(one)
        if policy == "dots":
            results = query + kv + 2 * one.hidden / self.grid.pieces("mlp")
            written = self.tokens * self.model.width if one.num_heads else 0
            return (self.whole * results + written) * self.itemsize
        kept = 0.0
        if policy in ("save_attention", "attention_collectives"):
            kept += self.whole * (query + kv + mixed) * self.itemsize
        if policy in ("collectives", "attention_collectives") and one.sends_rows:
            kept += self.rows(one) * self.model.width * self.itemsize  # sums that come back are no residuals
        return kept

    def _everything(self, one: Trait) -> float:
        """Without remat: every intermediate that a gradient reads, norms and rotations in float32, gathered experts."""
        query, kv, mixed = self._heads(one)
        hidden = one.hidden / self.grid.pieces("mlp")
        total = self.tokens * self.model.width * (3.5 * 4 + self.itemsize / 2)
        total += self.whole * ((3 * 4 + 2 * self.itemsize) * query + (1.5 * 4 + self.itemsize) * kv)
        total += self.whole * self.itemsize * (mixed + 6 * hidden)
        units = one.expert_hidden / self.sizes["expert_tensor"]
        total += self.rows(one) * ((self.itemsize + 1) * self.model.width + (7 * self.itemsize + 1) * units)
        gathered = sum(w.gathered(self.grid) for w in one.weights if w.routed)
        return total + (self.itemsize * gathered if self.grid.pieces("expert_embed") > 1 else 0)

    def _heads(self, one: Trait) -> tuple[float, float, float]:
        """Elements of a token's queries, of its keys and values, and of its mixed values, on one device."""
        cut = self.grid.pieces("heads")
        return one.query_width / cut, one.kv_width / cut, one.mixed_width / cut

    def _residuals(self, one: Trait) -> float:
        """What the backward pass of a sublayer reads."""
        tokens = self.whole if any(w.cut_by_tensor for w in one.weights) else self.tokens
        total = tokens * self.model.width * self.itemsize  # normed input, as the products read it
        if one.num_heads:
            query, kv, mixed = self._heads(one)
            normed = query + kv / 2 if one.head_norm else 0  # queries and keys before their norms
            total += self.whole * (query + kv + normed) * self.itemsize
            total += self.whole * mixed * (4 + self.itemsize)  # mixed values, as float32 sums and as they are projected
        if one.hidden:
            total += self.whole * 2 * one.hidden / self.grid.pieces("mlp") * self.itemsize
        if one.num_experts:
            hidden = 2 * one.expert_hidden / self.sizes["expert_tensor"]
            total += self.rows(one) * (self.model.width + hidden) * self.itemsize
        return total

    def rows(self, one: Trait) -> float:
        """Rows that one device reserves for its experts."""
        return self.tokens * one.rows_per_token * one.reserved(self.grid)

    def layer(self, pattern: tuple[Trait, ...]) -> float:
        """The worst of the pattern's sublayers, last to first: its transients on the residuals up to its own."""
        stream = 2 * self.tokens * self.model.width * self.itemsize  # a sublayer's input, the gradient on its way back
        worst = residuals = 0.0
        for one in pattern:
            residuals += max(0.0, self._residuals(one) - self.kept(one))
            worst = max(worst, residuals + self._transients(one))
        return stream + worst

    def _transients(self, one: Trait) -> float:
        """What a sublayer's backward pass holds beside its residuals."""
        total = 0.0
        if one.num_experts:
            total = self.rows(one) * self._row_transients(one)
        if one.num_heads:
            query, kv, mixed = self._heads(one)
            # Gradients of queries, keys and values as float32 sums; that of the mixed values twice, in two layouts.
            total = max(total, self.whole * (4 * (query + kv) + 2 * mixed * self.itemsize) + self._scores(one))
        if one.hidden:
            total = max(total, self.whole * 2 * one.hidden / self.grid.pieces("mlp") * self.itemsize)
        return total

    def _row_transients(self, one: Trait) -> float:
        """Bytes per row of the experts beside x, gate and up.

        Gradients of weights: d_y, the hidden units and, from libtpu's grouped product, a mask of experts by rows whose
        last dimension of 1 is stored as 128 bytes. Gradient of x: its two halves, while d_gate and d_up have taken the
        place of gate and up.
        """
        width, hidden = self.model.width, one.expert_hidden / self.sizes["expert_tensor"]
        mask = 0 if one.capacity_factor and self.sizes["expert"] == 1 else 128 * one.num_experts / self.sizes["expert"]
        return max((width + hidden) * self.itemsize + mask, 2 * width * self.itemsize)

    def _scores(self, one: Trait) -> float:
        """Scores, their softmax and their gradient: of a pair of chunks in float32, or of whole sequences."""
        heads, S = one.num_heads / self.grid.pieces("heads"), self.work.seq_len
        positions = S / self.sizes["context"]
        sequences = self.whole / positions
        if one.attend_chunk:
            return sequences * heads * min(one.attend_chunk, positions) ** 2 * 4 * 3
        return sequences * heads * positions * S * (4 + 4 + self.itemsize)

    def gathered(self, pattern: tuple[Trait, ...]) -> float:
        """Compute-dtype weights of one repeat as its products read them."""
        found = [one for trait in pattern for one in trait.weights]
        cut = [one for one in found if one.gathered(self.grid) * one.repeats > one.held(self.grid)]
        return self.itemsize * sum(one.gathered(self.grid) for one in cut)
