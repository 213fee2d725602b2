"""Total and active parameters, counted on the model's own parameter tree: they cannot drift from the model.

    total  = sum of the sizes of all parameters but those of multi-token prediction
    active = total - sum over sublayers of experts * (1 - active_share);   active_share = K / E for routed experts

Active is what one token passes through: everything but the E - K experts it does not select, so both embeddings count,
attention, norms, routers, shared experts and dense MLPs. Counting the input embedding as active is the convention of
the model cards (Mixtral 12.9B); for "active without embedding" subtract `embedding`. Multi-token prediction (`ahead`)
stands apart, as on the model cards (DeepSeek-V3 671B): it is trained, but a model that generates does without.
"""

import math
from typing import NamedTuple

from flax import nnx

from moe import param
from moe.models import DecoderConfig


class Parameters(NamedTuple):
    """Numbers of parameters. embedding, attention, mlp, experts and other add up to `total`."""

    total: int
    active: int
    """Of one token: its share of the experts, everything else in full."""
    embedding: int
    """Token embedding and, if it is not tied, output projection."""
    attention: int
    mlp: int
    """Dense MLPs and shared experts."""
    experts: int
    """All E experts of all layers, and all slots of memories."""
    other: int
    """Routers and norms."""
    ahead: int
    """Blocks and merges of multi-token prediction, in neither `total` nor `active`; a run trains `total` + `ahead`."""


# A parameter belongs to the first part one of whose logical axes (`moe.axes.TABLE`) it carries. Attention stands before
# experts: attention experts are attention, active in full.
_PARTS = (
    ("attention", {"heads", "kv_heads", "latent", "expert_heads", "expert_kv_heads"}),
    ("experts", {"experts", "memory_slots"}),
    ("embedding", {"vocab"}),
    ("mlp", {"mlp"}),
)


def count(config: DecoderConfig) -> Parameters:
    """Parameters of the decoder of `config`, from shapes alone: no memory, no device; ConfigError if it is bad."""
    sizes = dict.fromkeys(("embedding", "attention", "mlp", "experts", "other"), 0)
    unused, beyond = 0.0, 0
    layout, trunk = config.layout, len(config.trunk)
    for path, variable in nnx.to_flat_state(nnx.state(config.abstract(), nnx.Param)):
        axes = variable.get_metadata()[param.AXES_KEY]
        part = next((name for name, marks in _PARTS if marks.intersection(axes)), "other")
        size = math.prod(variable.get_value().shape)
        if path[0] == "merges" or (path[0] == "stacks" and int(str(path[1])) >= trunk):
            beyond += size
            continue
        sizes[part] += size
        if part == "experts":
            stack, place = (int(str(name)) for name in path[1:3])
            unused += size * (1 - layout[stack].layers[place].active_share)
    total = sum(sizes.values())
    return Parameters(total=total, active=total - round(unused), ahead=beyond, **sizes)
