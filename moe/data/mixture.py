"""A weighted mixture of sources."""

from collections.abc import Iterator
from dataclasses import dataclass

from moe.data.sources import Leaf, SourceConfig


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(SourceConfig):
    """Draws `weights[i] / sum(weights)` of the training sequences from `parts[i]`.

    A domain keeps its name unless two parts use it; then it becomes `name-i`, with i counted over all parts.
    """

    parts: tuple[SourceConfig, ...]
    """The sources."""
    weights: tuple[float, ...]
    """Relative share of the training sequences of each part."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.parts:
            yield "parts", "must have at least one source"
        if len(self.weights) != len(self.parts):
            yield "weights", f"must have as many values as there are parts, {len(self.parts)}"
        if not all(0 < weight < float("inf") for weight in self.weights):
            yield "weights", "must all be positive and finite"

    def leaves(self, where: str, weight: float = 1.0) -> Iterator[Leaf]:
        for index, (part, share) in enumerate(zip(self.parts, self.weights, strict=True)):
            yield from part.leaves(f"{where}.parts.{index}", weight * share / sum(self.weights))
