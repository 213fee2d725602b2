"""`launch.generate`: what it prints, and how it refuses."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import moe
from launch.generate import main
from moe import config as configs
from moe import param
from moe.layers.attention import AttentionConfig
from moe.layers.moe import MoEConfig
from moe.models import DecoderConfig
from moe.train.run import RunConfig


@pytest.fixture
def untrained(monkeypatch):
    """`moe.load` answers with an untrained model, whatever the workdir."""
    config = RunConfig(
        model=DecoderConfig(
            width=16, num_layers=2, attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_width=8),
            moe=MoEConfig(num_experts=4, expert_hidden=8),
        )
    )  # fmt: skip
    params = param.pure(config.model.build(jax.random.key(0)))
    run = SimpleNamespace(
        model=config.model.abstract(), params=params, bias_LE=jnp.zeros((2, 4)), config=config, step=1
    )  # fmt: skip
    monkeypatch.setattr(moe, "load", lambda workdir: run, raising=False)


COMMAND = ["--workdir", "runs/x", "--prompt", "def ", "--num-tokens", "6"]


def test_prints_prompt_and_continuation(untrained, capsys):
    assert main([*COMMAND, "--temperature", "0"]) == 0
    once = capsys.readouterr()
    assert once.out.startswith("def ") and once.err == ""
    assert main([*COMMAND, "--temperature", "0", "--seed", "5"]) == 0
    assert capsys.readouterr().out == once.out


def test_samples_are_numbered_and_follow_the_seed(untrained, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        assert main([*COMMAND, "--num-samples", "2", "--seed", seed]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("--- sample 1 of 2 ---\ndef ")
    assert "--- sample 2 of 2 ---\ndef " in outputs[0]
    assert outputs[0] == outputs[1] != outputs[2]


def test_says_when_positions_are_untrained(untrained, capsys):
    assert main(["--workdir", "runs/x", "--prompt", "d" * 256, "--num-tokens", "2"]) == 0
    assert capsys.readouterr().err == "note: 259 positions, of which the model was trained on the first 256\n"


def refused(arguments, capsys):
    """The one line `launch.generate` ends with."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*COMMAND, "--temperature", "-1"], "temperature = -1.0: must be at least 0"),
        ([*COMMAND, "--top-p", "0"], "top_p = 0.0: must be above 0"),
        ([*COMMAND, "--num-tokens", "0"], "num_tokens = 0: must be at least 1"),
        ([*COMMAND, "--num-samples", "0"], "num_samples = 0: must be at least 1"),
        ([*COMMAND, "--seed", "-1"], "seed = -1: must be at least 0"),
        ([*COMMAND, "--seed", "x"], "--seed"),
        ([*COMMAND, "--temprature", "1"], "--temprature"),
        (["--workdir", "runs/x"], "--prompt"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(monkeypatch, capsys, words, message):
    monkeypatch.setattr(moe, "load", lambda workdir: pytest.fail("loaded"), raising=False)
    assert message in refused(words, capsys)


def test_missing_workdir(tmp_path, capsys):
    assert str(tmp_path / "none") in refused(["--workdir", str(tmp_path / "none"), "--prompt", ""], capsys)


def test_workdir_without_a_checkpoint(tmp_path, capsys):
    configs.save(RunConfig(), tmp_path / "config.json")
    assert str(tmp_path) in refused(["--workdir", str(tmp_path), "--prompt", ""], capsys)
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
