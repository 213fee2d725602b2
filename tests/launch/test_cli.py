"""From a config file and words to a checked config: spelling, precedence, and one line for every mistake."""

import dataclasses
from pathlib import Path

import pytest

from configs import debug
from launch.cli import load_function, one_line_errors, override, parse
from moe.balance import ExpertBiasConfig
from moe.config import ConfigError, diff
from moe.train.run import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """A command."""

    path: str
    """A word that must be given."""
    count: int = 1
    """A number."""
    verbose: bool = False
    """A switch."""


def changed(*words: str) -> list[str]:
    return diff(debug.get_config(), override(debug.get_config(), words, "train"))


def write(folder: Path, text: str) -> str:
    path = folder / "some.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ([], []),
        (["--steps", "40"], ["steps: 20 -> 40"]),
        (["--steps=40"], ["steps: 20 -> 40"]),
        (["--batch-size", "16"], ["batch_size: 8 -> 16"]),
        (["--batch_size", "16"], ["batch_size: 8 -> 16"]),
        (["--model.moe.router.num_selected", "3"], ["model.moe.router.num_selected: 2 -> 3"]),
        (["--model.moe.router.num-selected", "3"], ["model.moe.router.num_selected: 2 -> 3"]),
        (["--optim.learning-rate", "1e-4"], ["optim.learning_rate: 0.003 -> 0.0001"]),
        (["--model.tie-embeddings", "False"], ["model.tie_embeddings: True -> False"]),
        (["--model.tie_embeddings", "True"], []),
        (["--balance.2.recentre", "True"], ["balance.2.recentre: False -> True"]),
        (["--balance.0.scope", "2"], ["balance.0.scope: 'global' -> 2"]),
        (["--balance.0.scope", "sequence"], ["balance.0.scope: 'global' -> 'sequence'"]),
        (["--data.source.domains", "code"], ["data.source.domains: ('english', 'headers') -> ('code',)"]),
        (["--profile", "3", "5"], ["profile: None -> (3, 5)"]),
        (["--init-from", "runs/a"], ["init_from: None -> 'runs/a'"]),
        (
            ["--optim.lr-scale", "router", "0.5", "norm", "0"],
            ["optim.lr_scale: () -> (('router', 0.5), ('norm', 0.0))"],
        ),
    ],
    ids=" ".join,
)
def test_a_word_changes_its_field_and_no_other(words: list[str], lines: list[str]) -> None:
    assert changed(*words) == lines


def test_the_last_of_two_words_for_a_field_wins_over_the_first_and_over_the_file() -> None:
    assert changed("--steps", "30", "--steps", "40") == ["steps: 20 -> 40"]
    assert changed("--batch_size", "16", "--batch-size", "32") == ["batch_size: 8 -> 32"]


def test_types_that_the_file_chose_stay() -> None:
    config = override(debug.get_config(), ["--balance.2.rate", "0.5"], "train")
    assert isinstance(config, RunConfig) and config.model.moe is not None
    rule = config.balance[2]
    assert isinstance(rule, ExpertBiasConfig) and rule.rate == 0.5


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--stepz", "3"], ["--stepz", "--steps"]),
        (["--model.moe.num-expert", "4"], ["--model.moe.num-expert", "--model.moe.num-experts"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps"], ["--steps"]),
        (["word"], ["word"]),
        (["--model.tie-embeddings"], ["--model.tie-embeddings"]),
        (["--model.tie-embeddings", "maybe"], ["--model.tie-embeddings", "maybe", "True", "False"]),
        (["--no-model.tie-embeddings"], ["--no-model.tie-embeddings"]),
        (["--profile", "3"], ["--profile"]),
        (["--batch-size", "7"], ["batch_size = 7: must be divisible by accumulation = 2"]),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        override(debug.get_config(), words, "train")
    said = str(caught.value)
    assert "\n" not in said and "  " not in said and not any("\u2500" <= letter <= "\u257f" for letter in said)
    for part in parts:
        assert part in said
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_a_missing_word_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--path") as caught:
        parse(Words, [], "tool")
    assert "\n" not in str(caught.value)
    assert parse(Words, ["--path", "a", "--verbose", "True"], "tool") == Words(path="a", verbose=True)


def test_help_ends_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Words, ["--help"], "tool")
    assert stop.value.code == 0 and "A number." in capsys.readouterr().out


def test_a_config_error_becomes_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise ConfigError("steps = 0: must be at least 1")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: steps = 0: must be at least 1\n"


def test_another_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


def test_a_function_of_a_file_is_called(tmp_path: Path) -> None:
    path = write(tmp_path, "def get_config():\n    return 3\n\n\ndef other():\n    return 4\n")
    assert (load_function(path), load_function(f"{path}:other"), load_function(path, "other")) == (3, 4, 4)
    assert load_function("configs/debug.py") == debug.get_config()
    assert load_function("configs/debug.py:folder") == debug.folder()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "SyntaxError: .*line 1"),
        ("x = 1\nimport there_is_none\n", r"ModuleNotFoundError: No module named 'there_is_none' \(line 2\)"),
        ("x = y\n", r"NameError: name 'y' is not defined \(line 1\)"),
        ("x = 1\n", "has no function 'get_config'; it has "),
        ("def a():\n    pass\n\n\ndef b():\n    pass\n", "has no function 'get_config'; it has a, b"),
        # A class is no config function, an imported one is.
        ("from pathlib import Path as get_config\n", "has no function 'get_config'"),
        (
            "from moe.layers.moe import MoEConfig\n\n\ndef get_config():\n    return MoEConfig(num_expert=4)\n",
            r"TypeError: .*unexpected keyword argument 'num_expert'.* \(line 5\)",
        ),
        (
            "import dataclasses\nfrom configs import debug\n\n\ndef get_config():\n"
            "    return dataclasses.replace(debug.get_config(), stepz=4)\n",
            r"TypeError: .*unexpected keyword argument 'stepz'.* \(line 6\)",
        ),
        ("def get_config(size):\n    return size\n", "TypeError: .*missing 1 required positional argument: 'size'"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_function(path)
    assert str(caught.value).startswith(f"config = '{path}': ") and "\n" not in str(caught.value)


def test_a_config_file_that_is_not_there_or_no_python_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config = 'nowhere\.py': there is no such file$"):
        load_function("nowhere.py:get_config")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.txt': is not a Python file$"):
        load_function(f"{tmp_path}/a.txt")


def test_a_mistake_that_is_no_slip_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        load_function(write(tmp_path, "def get_config():\n    return 1 / 0\n"))
