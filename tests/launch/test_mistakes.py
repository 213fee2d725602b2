"""Every mistake is one line that names path and value, exit status 2, and leaves no workdir behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import evaluate, generate, report, train

DEBUG = "configs/debug.py:folder"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of text, and next to it inputs that are broken in different ways."""
    for domain in ("a", "b"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for index in range(4):
            (tmp_path / "text" / domain / f"{index}.txt").write_text(f"some {domain} text {index} " * 200)
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin1").mkdir()
    (tmp_path / "latin1" / "x.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "x.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("do not touch")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "syntax.py").write_text("def get_config(:\n")
    (tmp_path / "missing.py").write_text("import there_is_no_such_module\n")
    (tmp_path / "number.py").write_text("def get_config():\n    return 3\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "files.py").write_text(
        "import dataclasses\nfrom configs import debug\nfrom moe.data import FilesConfig, TfdsConfig\n"
        "from moe.balance import LoadBalanceConfig\n"
        "def _data(source):\n    c = debug.get_config()\n"
        "    return dataclasses.replace(c, data=dataclasses.replace(c.data, source=source))\n"
        "def get_config():\n    return _data(FilesConfig(paths=('none.jsonl',)))\n"
        "def tfds():\n    return _data(TfdsConfig(name='lm1b:1.1.0', data_dir='nowhere'))\n"
        "def twice():\n    c = debug.get_config()\n"
        "    return dataclasses.replace(c, balance=(LoadBalanceConfig(), LoadBalanceConfig()))\n"
    )
    return tmp_path


# (what is typed after the config, what the line must contain); PLACE stands for the folder above.
FLAGS = {
    "unknown field": (["--model.moe.num-expert", "4"], ["--model.moe.num-expert", "--model.moe.num-experts"]),
    "misspelt field": (["--optim.learning-rat", "1"], ["--optim.learning-rate"]),
    "stray word": (["steps=3"], ["steps=3"]),
    "wrong type": (["--steps", "many"], ["--steps", "many", "int"]),
    "wrong choice": (["--model.moe.router.score", "relu"], ["--model.moe.router.score", "relu", "sigmoid"]),
    "missing value": (["--steps"], ["--steps"]),
    "field of another type": (["--model.moe.dispatch.capacity-factor", "2"], ["--model.moe.dispatch.capacity-factor"]),
    "K > E": (["--model.moe.router.num-selected", "9"], ["model.moe.router.num_selected = 9", "num_experts = 8"]),
    "K = 0": (["--model.moe.router.num-selected", "0"], ["model.moe.router.num_selected = 0", "at least 1"]),
    "K = 1 renormalised": (["--model.moe.router.num-selected", "1"], ["model.moe.router.normalise", "'none'"]),
    "sigmoid then softmax": (
        ["--model.moe.router.score", "sigmoid", "--model.moe.router.normalise", "softmax"],
        ["model.moe.router.normalise = 'softmax'", "sigmoid"],
    ),
    "batch by accumulation": (["--batch-size", "7"], ["batch_size = 7", "accumulation = 2"]),
    "batch by mesh": (["--mesh.fsdp", "3"], ["batch_size = 8", "data * fsdp = 3"]),
    "experts by mesh": (
        ["--mesh.expert", "3", "--batch-size", "12"],
        ["model.moe.num_experts = 8", "mesh.expert = 3"],
    ),
    "width by mesh": (["--mesh.fsdp", "5", "--batch-size", "10"], ["model.width = 32", "mesh.fsdp = 5"]),
    "key-value heads by mesh": (["--mesh.tensor", "4"], ["model.attention.num_kv_heads = 2", "mesh.tensor = 4"]),
    "more mesh than devices": (
        ["--mesh.fsdp", "8", "--mesh.tensor", "2", "--batch-size", "16"],
        ["mesh = (", "devices"],
    ),
    "heads": (["--model.attention.num-kv-heads", "3"], ["model.attention.num_kv_heads = 3", "num_heads = 4"]),
    "odd head": (["--model.attention.head-width", "7"], ["model.attention.head_width = 7", "even"]),
    "dense layers": (["--model.dense-layers", "4"], ["model.dense_layers = 4", "num_layers = 3"]),
    "no MoE layer": (["--model.moe-every", "5"], ["model.moe_every = 5"]),
    "ignored MLP": (["--model.dense-layers", "0"], ["model.mlp_hidden = 64", "ignored"]),
    "ignored accumulation mode": (
        ["--balance.0.scope", "sequence", "--balance.0.accumulation", "buffer"],
        ["balance.0.accumulation = 'buffer'", "ignored"],
    ),
    "groups that do not divide": (["--balance.0.scope", "3"], ["balance.0.scope = 3", "2, 4, 8"]),
    "scope 0": (["--balance.0.scope", "0"], ["balance.0.scope = 0"]),
    "scope by a wrong name": (["--balance.0.scope", "local"], ["--balance.0.scope", "sequence"]),
    "name of the language-model loss": (["--balance.0.name", "lm"], ["balance.0.name = 'lm'"]),
    "negative coefficient": (["--balance.0.coefficient", "-1"], ["balance.0.coefficient = -1.0"]),
    "coefficient of the bias": (["--balance.2.coefficient", "1"], ["balance.2.coefficient", "rate"]),
    "warm-up": (["--optim.schedule.warmup-steps", "20"], ["optim.schedule.warmup_steps = 20", "steps = 20"]),
    "learning rate": (["--optim.learning-rate", "0"], ["optim.learning_rate = 0.0", "greater than 0"]),
    "beta": (["--optim.beta2", "1"], ["optim.beta2 = 1.0"]),
    "pattern not found": (["--optim.lr-scale", "ruoter", "0.5"], ["optim.lr_scale = 'ruoter'", "router"]),
    "pattern": (["--optim.lr-scale", "[", "0.5"], ["optim.lr_scale", "regular expression"]),
    "vocabulary": (["--model.vocab-size", "100"], ["model.vocab_size = 100", "258"]),
    "sequence length": (["--data.seq-len", "2"], ["data.seq_len = 2"]),
    "profile": (["--profile", "5", "3"], ["profile = (5, 3)"]),
    "best without evaluation": (["--evaluate.every", "0"], ["checkpoint.keep_best = 1", "evaluate.every"]),
    "missing folder": (["--data.source.path", "PLACE/nowhere"], ["data.source.path", "nowhere"]),
    "empty folder": (["--data.source.path", "PLACE/empty"], ["data.source.path", "empty"]),
    "not UTF-8": (["--data.source.path", "PLACE/latin1"], ["data.source.path", "x.txt", "UTF-8"]),
    "unreadable": (["--data.source.path", "PLACE/dangling"], ["data.source.path", "x.txt"]),
    "init-from": (["--init-from", "PLACE/nowhere"], ["nowhere", "config.json"]),
}  # fmt: skip

SPECS = {
    "no such config": ("configs/nothing.py", ["configs/nothing.py"]),
    "no such function": ("configs/debug.py:nothing", ["nothing", "get_config"]),
    "syntax error": ("PLACE/syntax.py", ["syntax.py", "SyntaxError", "line 1"]),
    "import error": ("PLACE/missing.py", ["there_is_no_such_module"]),
    "not a RunConfig": ("PLACE/number.py", ["RunConfig", "int"]),
    "missing file": ("PLACE/files.py", ["data.source.paths", "none.jsonl"]),
    "TFDS data set that is not there": ("PLACE/files.py:tfds", ["lm1b", "nowhere"]),
    "two rules of one name": ("PLACE/files.py:twice", ["balance.1.name = 'load_balance'"]),
}


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def base(place: Path) -> list[str]:
    return ["--data.source.path", f"{place}/text", "--data.cache-dir", f"{place}/cache"]


@pytest.mark.parametrize("name", FLAGS)
def test_a_wrong_flag_is_one_line(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, parts = FLAGS[name]
    words = [DEBUG, "--workdir", f"{place}/run", *base(place), *(word.replace("PLACE", str(place)) for word in flags)]
    said = run(words, capsys)
    for part in parts:
        assert part in said
    assert not (place / "run").exists()


@pytest.mark.parametrize("name", SPECS)
def test_a_wrong_config_file_is_one_line(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, parts = SPECS[name]
    said = run([spec.replace("PLACE", str(place)), "--workdir", f"{place}/run"], capsys)
    for part in parts:
        assert part in said
    assert not (place / "run").exists()


def test_a_bad_line_of_jsonl_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{place}/files.py", "--workdir", f"{place}/run", "--data.source.paths", f"{place}/bad.jsonl"]
    said = run([*words, "--data.cache-dir", f"{place}/cache"], capsys)
    assert "bad.jsonl" in said and "2" in said
    assert not (place / "run").exists()


@pytest.mark.parametrize("workdir", ["file", "foreign"])
def test_a_workdir_that_is_no_run_is_left_alone(workdir: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    assert f"workdir = '{place}/{workdir}'" in run([DEBUG, "--workdir", f"{place}/{workdir}", *base(place)], capsys)
    assert sorted(place.rglob("*")) == before


def test_workdir_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--workdir" in run([DEBUG, "--workdir"], capsys)


def test_another_config_in_the_same_workdir_is_refused_with_the_difference(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.cli import load_function, override
    from moe import config as configs

    workdir = place / "run"
    workdir.mkdir()
    configs.save(override(load_function(DEBUG), base(place), "test"), workdir / "config.json")
    before = (workdir / "config.json").read_text()
    said = run([DEBUG, "--workdir", str(workdir), *base(place), "--model.moe.num-experts", "16"], capsys)
    assert "model.moe.num_experts: 8 -> 16" in said
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    assert (workdir / "config.json").read_text() == before and json.loads(before)["steps"] == 20


def test_parameters_of_another_shape_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import load_function, override
    from moe import config as configs

    (place / "other" / "checkpoints" / "3").mkdir(parents=True)
    configs.save(override(load_function(DEBUG), base(place), "test"), place / "other" / "config.json")
    words = [DEBUG, "--workdir", f"{place}/run", *base(place), "--init-from", f"{place}/other", "--model.width", "64"]
    said = run(words, capsys)
    assert "init_from" in said and "embedding is (264, 32) there and (264, 64) here" in said


@pytest.mark.parametrize("tool", [evaluate, generate, report])
def test_the_other_commands_name_a_folder_that_is_no_run(
    tool: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path)] if tool is report else ["--workdir", str(tmp_path)]
    words += ["--prompt", "x"] if tool is generate else []
    try:
        code = tool.main(words)  # type: ignore[attr-defined]
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path) in said


def test_a_mistake_is_found_before_a_device_is_touched(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "launch.train", DEBUG, "--workdir", f"{tmp_path}/run", "--batch-size", "7"]
    # A platform that does not exist: any device work would end in another error.
    done = subprocess.run(
        words, env={"JAX_PLATFORMS": "nothing", "PATH": ""}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == "error: batch_size = 7: must be divisible by accumulation = 2\n"
    assert not (tmp_path / "run").exists()
