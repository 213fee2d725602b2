"""What every stage of a pipeline does in every iteration; the order is that of `moe.models.pipeline`."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who does what when: numbers that depend on sizes alone. `T` counts iterations."""

    stages: int
    microbatches: int
    rounds: int

    @property
    def num_items(self) -> int:
        """Pairs of a micro-batch and a round: what a stage has to do."""
        return self.microbatches * self.rounds

    @property
    def num_iterations(self) -> int:
        return self.num_items + self.stages - 1

    def item(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(micro-batch, round) of items, counted in the order in which stage 0 begins them."""
        group, rest = np.divmod(np.clip(number, 0, self.num_items - 1), self.rounds * self.stages)
        round_, member = np.divmod(rest, self.stages)
        return (group * self.stages + member).astype(np.int32), round_.astype(np.int32)

    def table(self) -> dict[str, np.ndarray]:
        """Of every iteration: what stage 0 takes in (or not), the stages' rounds, where the last one's output goes."""
        t_T = np.arange(self.num_iterations)
        takes_T, round_T = self.item(t_T)
        t_TP = t_T[:, None] - np.arange(self.stages)
        return {
            "takes": takes_T,
            "fresh": (round_T == 0) & (t_T < self.num_items),
            "round": self.item(t_TP)[1],
            # Before anything arrives the first slot, which is written again; of all rounds the last stays.
            "gives": self.item(t_T - (self.stages - 1))[0],
        }
