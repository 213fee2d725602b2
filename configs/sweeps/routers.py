"""Every router of configs/routers.py with two seeds, compared with top_k: what docs/results/routers.md shows.

    python -m launch.sweep configs/sweeps/routers.py --workdir runs/routers
    python -m launch.report runs/routers --out docs/results/routers.md
    python -m launch.sweep configs/sweeps/routers.py --only "top_k*" --set steps=100 --workdir runs/routers-short

2 to 4 minutes a run on two CPU cores.
"""

from configs import routers
from moe.sweep import Sweep, configs_in


def get_sweep() -> Sweep:
    return Sweep(variants=configs_in(routers), seeds=(0, 1), baseline="top_k")
