"""What a sweep is: which configs with which seeds, under which names, in which folders. Runs nothing itself."""

from moe.sweep.spaces import Configs, Grid, Listed, Space, Zip, configs_in
from moe.sweep.sweep import Sweep, SweepRun

__all__ = ["Configs", "Grid", "Listed", "Space", "Sweep", "SweepRun", "Zip", "configs_in"]
