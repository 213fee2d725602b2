"""One line from a workdir to a model: `run = moe.load("runs/quickstart")`."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moe import config as configs
from moe import param
from moe.config import ConfigError
from moe.models import Decoder
from moe.optim.adamw import parameter_paths
from moe.train.loss import bias_of
from moe.train.run import RunConfig
from moe.train.saved import latest_step, restore_parts

CONFIG_NAME = "config.json"


class Run(NamedTuple):
    """A trained model on one device."""

    model: Decoder
    """Abstract: structure without values."""
    params: dict[str, Any]
    bias_LE: jax.Array
    """float32 expert bias of every MoE layer, as training would use it next."""
    config: RunConfig
    step: int

    def __call__(self, context: Any) -> tuple[jax.Array, Any]:
        """Logits [B, S, V] and statistics for a `moe.routing.base.Context`."""
        return param.bind(self.model, self.params)(context, self.bias_LE)


def load_config(workdir: Path) -> RunConfig:
    """The config a workdir was started with."""
    path = Path(workdir) / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"workdir = '{workdir}': holds no {CONFIG_NAME}, so it is not the folder of a run")
    return configs.load(path)


def load(workdir: str | Path, step: int | None = None) -> Run:
    """Parameters and router state of a run's newest checkpoint, or of `step`; ConfigError if it is not there."""
    workdir = Path(workdir)
    config = load_config(workdir)
    step = latest_step(workdir) if step is None else step
    model = config.model.abstract()
    params, balance = load_params(workdir, step, config)
    return Run(model, params, bias_of(model, config.balance, balance), config, step)


def load_params(workdir: Path, step: int, config: RunConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, balance state) of a checkpoint, on the first local device."""
    model = config.model
    device = SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        "params": param.pure(model.abstract()),
        "balance": jax.eval_shape(lambda: {rule.name: rule.init_state(model.exists_LE) for rule in config.balance}),
    }
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), abstract)
    found = restore_parts(workdir, step, placed)
    return jax.tree.map(jnp.asarray, found["params"]), found["balance"]


def check_fits(workdir: Path, config: RunConfig) -> None:
    """ConfigError unless the parameters of the run in `workdir` have the names and shapes that `config` wants."""

    def shapes(one: RunConfig) -> dict[str, tuple[int, ...]]:
        params = param.pure(one.model.abstract())
        names = jax.tree.leaves(parameter_paths(params))
        return {name: leaf.shape for name, leaf in zip(names, jax.tree.leaves(params), strict=True)}

    there, here = shapes(load_config(workdir)), shapes(config)
    latest_step(workdir)
    wrong = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    if wrong:
        said = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in wrong[:3])
        raise ConfigError(f"init_from = '{workdir}': {len(wrong)} of its parameters do not fit: {said}")
