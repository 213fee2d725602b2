"""The layers of a decoder as a list of sublayers, grouped into stacks that a `lax.scan` can run.

A stack is a pattern of sublayers and how often it is repeated; one stack is one loop, so compile time does not grow
with repeats. Layers of different shape (pyramids: another number of experts further up) are stacks of their own.

    a, m = AttentionConfig(), MoEConfig()
    StackConfig(layers=(a, m), repeats=24)
    StackConfig(layers=parse_layout("a m f a m f m f", a=a, m=m, f=MLPConfig()), repeats=3)

Source: layouts as letters after Zhou et al. 2023, Brainformers (arXiv 2306.00008, section 3). Differs from the paper:
the search for a layout is not here.
"""

import dataclasses
from collections.abc import Iterator

from moe.config import ConfigError, at_least
from moe.layers.base import SublayerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A pattern of sublayers, repeated."""

    layers: tuple[SublayerConfig, ...]
    """The pattern, in order; each one is added to the residual stream."""
    repeats: int = 1
    """How often the pattern is repeated; parameters are not shared."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from at_least(self, repeats=1)
        if not self.layers:
            yield "layers", "must hold at least one sublayer"


Stacks = tuple[StackConfig, ...]


def rhythm(
    attention: SublayerConfig, dense: SublayerConfig, experts: SublayerConfig | None, *,
    num_layers: int, dense_layers: int, every: int,
) -> Stacks:  # fmt: skip
    """Attention and one feed-forward a layer: `dense_layers` dense ones, then periods of `every` whose last is experts.

    At most three stacks: leading dense layers, whole periods, and what is left of a last period.
    """
    dense_layers, every = (dense_layers, every) if experts is not None else (num_layers, 1)
    periods, left = divmod(num_layers - dense_layers, every)
    plain = (attention, dense)
    last = () if experts is None else (attention, experts)
    found = ((plain, dense_layers), (plain * (every - 1) + last, periods), (plain, left))
    return tuple(StackConfig(layers=layers, repeats=repeats) for layers, repeats in found if repeats > 0)


def parse_layout(layout: str, /, **letters: SublayerConfig) -> tuple[SublayerConfig, ...]:
    """The sublayers that the words of `layout` name, in order; ConfigError for a word or a letter without the other."""
    words = layout.split()
    for word in words:
        if word not in letters:
            raise ConfigError(f"layout = {layout!r}: no sublayer is called {word!r}; there are {', '.join(letters)}")
    for letter in letters:
        if letter not in words:
            raise ConfigError(f"layout = {layout!r}: {letter!r} does not occur in it")
    return tuple(letters[word] for word in words)


def in_order(stacks: Stacks) -> Iterator[SublayerConfig]:
    """Every sublayer of the model, first to last."""
    for stack in stacks:
        for _ in range(stack.repeats):
            yield from stack.layers


def first_block(stacks: Stacks) -> int:
    """Number of sublayers before the second one that mixes tokens: the first attention and what follows it."""
    mixing = 0
    for index, config in enumerate(in_order(stacks)):
        mixing += config.mixes_tokens
        if mixing == 2:
            return index
    return sum(len(stack.layers) * stack.repeats for stack in stacks)


def split_at(stacks: Stacks, index: int) -> Stacks:
    """The same layers in stacks whose repeats lie all before sublayer `index`, all after it, or (one alone) astride."""
    out: list[StackConfig] = []
    for stack in stacks:
        size = len(stack.layers) * stack.repeats
        before, astride = divmod(max(0, min(index, size)), len(stack.layers))
        pieces = (before, 1 if astride else 0, stack.repeats - before - (1 if astride else 0))
        out += [dataclasses.replace(stack, repeats=repeats) for repeats in pieces if repeats]
        index -= size
    return tuple(out)
