import dataclasses
import subprocess
import sys

import pytest

from moe.config import ConfigError, check, from_dict, to_dict
from moe.data import (
    ByteConfig,
    DataConfig,
    FilesConfig,
    FolderConfig,
    HuggingFaceConfig,
    MixtureConfig,
    StdlibConfig,
    TfdsConfig,
    check_inputs,
    prepare,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 7}, r"^data\.seq_len = 7: must be at least 8$"),
        ({"validation_fraction": 0.0}, r"^data\.validation_fraction = 0\.0: must be above 0 and at most 0\.5$"),
        ({"validation_fraction": 0.6}, "at most 0.5"),
        ({"domain_weights": "sise"}, "^data.domain_weights = 'sise': must be 'size' or 'equal'$"),
        ({"cache_dir": ""}, "data.cache_dir = '': must name a folder"),
        ({"num_threads": -1}, "data.num_threads = -1: must be at least 0"),
        ({"shuffle_seed": -1}, "data.shuffle_seed = -1: must be at least 0"),
        ({"source": StdlibConfig(domains=("cod",))}, r"data\.source\.domains = \('cod',\): 'cod' is not one of code"),
        ({"source": FolderConfig(path="")}, "data.source.path = '': must name a folder of text files"),
        ({"source": TfdsConfig(name="c4 en")}, "data.source.name = 'c4 en': must be a TFDS name"),
        ({"source": MixtureConfig(parts=(), weights=())}, "data.source.parts = .*: must have at least one source"),
        (
            {"source": MixtureConfig(parts=(StdlibConfig(),), weights=(1.0, 2.0))},
            r"data\.source\.weights = \(1\.0, 2\.0\): must have as many values as there are parts, 1",
        ),
        ({"source": MixtureConfig(parts=(StdlibConfig(),), weights=(0.0,))}, "must all be positive and finite"),
        ({"source": MixtureConfig(parts=(StdlibConfig(),), weights=(float("nan"),))}, "must all be positive"),
        (
            {"source": MixtureConfig(parts=(StdlibConfig(), FilesConfig(paths=())), weights=(1, 1))},
            r"data\.source\.parts\.1\.paths = \(\): must name at least one file",
        ),
    ],
)
def test_problems_name_path_value_and_limit(change, message):
    with pytest.raises(ConfigError, match=message):
        check_inputs(dataclasses.replace(DataConfig(), **change))


def test_cache_dir_in_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    config = DataConfig(source=StdlibConfig(domains=("names",)), cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"data\.cache_dir = '.*cache': cannot write to '.*file'"):
        check_inputs(config)
    with pytest.raises(ConfigError, match=r"data\.cache_dir = '.*cache': cannot be made \(Not a directory\)"):
        prepare(config)


def test_missing_folder_inside_a_mixture_is_named(tmp_path):
    mixture = MixtureConfig(parts=(StdlibConfig(), FolderConfig(path=str(tmp_path / "absent"))), weights=(1, 1))
    with pytest.raises(ConfigError, match=r"data\.source\.parts\.1\.path = '.*absent': there is no such folder"):
        check_inputs(DataConfig(source=mixture))


def test_configs_survive_a_round_trip():
    config = DataConfig(
        source=MixtureConfig(
            parts=(StdlibConfig(domains=("code",)), FilesConfig(paths=("a.jsonl",)), TfdsConfig(name="lm1b")),
            weights=(1.0, 2.0, 3.0),
        ),
        tokenizer=HuggingFaceConfig(path="tokenizer.json"),
    )
    assert from_dict(to_dict(config)) == config
    check(config)
    assert DataConfig().tokenizer == ByteConfig()


def test_no_tensorflow():
    code = "import sys, moe.data; sys.exit('tensorflow' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0
    assert "tensorflow" not in sys.modules
