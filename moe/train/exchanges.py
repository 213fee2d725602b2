"""What the exchanges of a model can make of a mesh: what cannot work is refused, what has no effect is said.

A setting that cannot work on the mesh is a mistake. One that merely has no effect there is not: a config written for a
pod must run on a laptop, and a run may go on on another mesh (`moe.train.workdir.MAY_CHANGE`) while its model, of which
the exchange is a part, may not change. So that is a line in the log when a run starts.
"""

from collections.abc import Iterator

from moe.config import walk
from moe.dispatch import ExchangeConfig, RingConfig
from moe.dispatch.exchange import Sizes, takes_place
from moe.models import DecoderConfig


def mesh_problems(model: DecoderConfig, sizes: Sizes) -> Iterator[tuple[str, str]]:
    """(path, what is wrong) of exchanges that cannot work on a mesh with axes of these sizes."""
    if takes_place(sizes):
        for path, exchange in _exchanges(model):
            for field, limit in exchange.mesh_problems(sizes):
                yield path + field, limit


def without_effect(model: DecoderConfig, sizes: Sizes) -> Iterator[str]:
    """A line for every setting of an exchange, other than the default, that changes nothing on this mesh."""
    for path, exchange in _exchanges(model):
        if takes_place(sizes):
            for field, why in exchange.without_effect(sizes):
                yield f"{path}{field} = {getattr(exchange, field)} has no effect on this mesh: {why}"
        elif exchange != RingConfig():
            name = type(exchange).__name__
            yield f"{path[:-1]} = {name} has no effect on this mesh: it cuts neither experts nor positions"


def not_sized(model: DecoderConfig) -> Iterator[str]:
    """Paths of the budgets that no ladder can size, as the exchange does not count what it would need."""
    for path, exchange in _exchanges(model):
        if getattr(exchange, "budget", None) is not None and exchange.at_capacity(1.0) == exchange.at_capacity(2.0):
            yield f"{path}budget"


def _exchanges(model: DecoderConfig) -> Iterator[tuple[str, ExchangeConfig]]:
    return ((path, part) for path, part in walk(model, "model.") if isinstance(part, ExchangeConfig))
