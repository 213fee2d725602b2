"""An ablation in a few lines: granularity of the experts against the learning rate, three seeds, paired with the first.

python -m launch.sweep configs/sweeps/experts.py --dry-run True
"""

from configs import quickstart
from moe.sweep import Grid, Sweep, Zip


def get_sweep() -> Sweep:
    """The same active parameters in ever smaller experts (Zip), each with two learning rates (Grid)."""
    finer = Zip(
        over={
            "model.moe.num_experts": (8, 16, 32),
            "model.moe.expert_hidden": (128, 64, 32),
            "model.moe.router.num_selected": (2, 4, 8),
        }
    )
    return Sweep(
        variants=finer * Grid(over={"optim.learning_rate": (2e-3, 4e-3)}),
        base=quickstart.get_config(),
        seeds=(0, 1, 2),
        baseline="num_experts=8,expert_hidden=128,num_selected=2,learning_rate=0.004",
    )
