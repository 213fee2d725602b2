"""Top-k token choice: every token takes the K experts it scores highest.

    z = x W_router                            (float32 whatever the compute dtype)
    s = softmax(z)  or  sigmoid(z)
    chosen = top-K of  stop_gradient(s) + bias
    w = s_chosen | s_chosen / sum(s_chosen) | softmax(z_chosen),   times `scale`

With groups, experts in G equal consecutive groups: only those of the best groups can be chosen. A group's score is the
sum of its two highest selection scores s + bias (`top2`), or the highest one (`max`). Groups that tie: the lower wins.
With jitter, training scores x * U(1 - jitter, 1 + jitter) instead of x; the experts get x.

The expert bias moves the selection and never the weight. The probabilities handed to the balance rules are softmax(z),
or s / sum(s) for sigmoid scores, computed as softmax(log s): no epsilon, so pushing all scores towards 0 cannot escape
the balance loss (with an epsilon in the denominator it can). They cover all experts, also those of groups left out.
The margin is taken among the experts of the chosen groups.

Gradient: through `weight`, `probs` and `log_z`; the selection carries none. Collectives: none.
Source: Shazeer et al. 2017 (arXiv 1701.06538, section 2.1) for top-k then softmax; Fedus et al. 2021 (arXiv
2101.03961, eq. 1-2) for softmax then top-k, and its section 2.4 for jitter (from memory, not verified); DeepSeek-V3
(arXiv 2412.19437, eq. 13-16) for sigmoid scores and bias, its released inference code for groups scored by `top2` with
a bias and by `max` without (as in DeepSeek-V2, arXiv 2405.04434).
Differs from the paper: DeepSeek-V3 groups experts by the node that holds them; here the config says how many groups.
Dividing softmax scores by their sum is the same function as the softmax of the chosen logits; both are kept because
configurations name either.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from moe.config import at_least
from moe.kernels.highest import highest
from moe.routing import noise
from moe.routing.base import Context, LinearRouterConfig, Routing
from moe.routing.choice import softmax, token_choice, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKConfig(LinearRouterConfig):
    """Top-k token choice."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    normalise: Literal["none", "sum", "softmax"] = "none"
    """Combine weights: the scores as they are, divided by their sum over the K, or softmax over the K logits."""
    scale: float = 1.0
    """Factor on the combine weights (DeepSeek-V3: 2.5)."""
    num_groups: int = 1
    """Equal consecutive groups of experts; 1: no groups."""
    num_groups_selected: int = 1
    """Groups whose experts a token can choose."""
    group_score: Literal["top2", "max"] = "top2"
    """Score of a group: the sum of its two highest selection scores (DeepSeek-V3), or the highest (DeepSeek-V2)."""
    jitter: float = 0.0
    """In training, scored inputs are multiplied by U(1 - jitter, 1 + jitter)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.score == "sigmoid" and self.normalise == "softmax":
            yield "normalise", "softmax over the chosen logits ignores score='sigmoid'; use 'sum' or 'none'"
        if self.num_selected == 1 and self.normalise != "none":
            yield "normalise", "must be 'none' when num_selected is 1: the weight would be 1 and the router never learn"
        if not self.scale > 0:
            yield "scale", "must be greater than 0"
        yield from at_least(self, num_groups=1, num_groups_selected=1, jitter=0)
        if self.num_groups_selected > self.num_groups:
            yield "num_groups_selected", f"must be at most num_groups = {self.num_groups}"
        if self.num_groups > 1 and self.num_groups_selected == self.num_groups:
            yield "num_groups_selected", f"must be less than num_groups = {self.num_groups}, or groups change nothing"
        if self.num_groups == 1 and self.group_score != "top2":
            yield "group_score", "is ignored when num_groups is 1"
        if not self.jitter < 1:
            yield "jitter", "must be less than 1, or inputs change sign"

    def layer_problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        yield from super().layer_problems(num_experts)
        size, rest = divmod(num_experts, self.num_groups)
        if rest:
            yield "num_groups", f"must divide num_experts = {num_experts}"
        elif self.num_groups > 1 and self.num_selected > size * self.num_groups_selected:
            limit = f"{self.num_groups_selected} groups of {size} experts"
            yield "num_selected", f"must be at most {size * self.num_groups_selected}: {limit} can be chosen"
        elif self.num_groups > 1 and self.group_score == "top2" and size < 2:
            yield "group_score", f"'top2' needs groups of 2 experts, but num_experts = {num_experts} gives 1: use 'max'"

    @property
    def gives_scores(self) -> bool:
        return self.num_groups == 1  # among groups the best scores are not those taken

    def permutation(self, key: jax.Array, num_experts: int) -> jax.Array:
        """Groups among themselves, and experts inside their group."""
        groups, members = jax.random.split(key)
        first_G = jax.random.permutation(groups, self.num_groups)[:, None] * (num_experts // self.num_groups)
        inside = lambda key: jax.random.permutation(key, num_experts // self.num_groups)  # noqa: E731
        return (first_G + jax.vmap(inside)(jax.random.split(members, self.num_groups))).reshape(-1)

    def inputs(self, x_BSD: jax.Array, context: Context) -> jax.Array:
        return noise.jitter(x_BSD, context, self.jitter)

    def route(self, logits_BSE: jax.Array, context: Context, bias_E: jax.Array) -> Routing:
        if self.score == "sigmoid":
            log_scores_BSE, log_z_BS = jax.nn.log_sigmoid(logits_BSE), jax.nn.logsumexp(logits_BSE, axis=-1)
            probs_BSE = jax.nn.softmax(log_scores_BSE, axis=-1)
            select_BSE = jnp.exp(log_scores_BSE) + bias_E
        else:
            log_scores_BSE, probs_BSE, log_z_BS = softmax(logits_BSE)
            select_BSE = probs_BSE + bias_E
        expert_BSK, margin_BS = top_k(self._among_groups(select_BSE), self.num_selected)
        chosen_BSK = jnp.take_along_axis(log_scores_BSE, expert_BSK, axis=-1)
        weight_BSK = jnp.exp(chosen_BSK) if self.normalise == "none" else jax.nn.softmax(chosen_BSK, axis=-1)
        return token_choice(
            context,
            expert_BSK=expert_BSK,
            weight_BSK=self.scale * weight_BSK,
            probs_BSE=probs_BSE,
            log_z_BS=log_z_BS,
            margin_BS=margin_BS,
            select_BSE=select_BSE if self.num_groups == 1 else None,
        )

    def _among_groups(self, select_BSE: jax.Array) -> jax.Array:
        """Selection scores, those of the groups left out below all others."""
        if self.num_groups == 1:
            return select_BSE
        G = self.num_groups
        select_BSE = jax.lax.stop_gradient(select_BSE)
        select_BSGe = select_BSE.reshape(*select_BSE.shape[:-1], G, -1)
        best, _ = highest(select_BSGe, 2 if self.group_score == "top2" else 1)
        group_BSg, _ = top_k(best.sum(axis=-1), self.num_groups_selected)
        open_BSG = (group_BSg[..., None] == jnp.arange(G)).any(axis=-2)
        return jnp.where(open_BSG[..., None], select_BSGe, -jnp.inf).reshape(select_BSE.shape)
