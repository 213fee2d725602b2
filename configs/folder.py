"""The quickstart model on a folder of your own text; every subfolder is a domain.

python -m launch.train configs/folder.py --data.source.path DIR
"""

import dataclasses

from configs import quickstart
from moe.data import FolderConfig
from moe.train.run import RunConfig


def get_config() -> RunConfig:
    config = quickstart.get_config()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=FolderConfig(path="text")))
