"""The rules of the house that a reader of one file cannot see: imports go down only, files and functions stay short."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for top in ("moe", "configs", "launch") for path in (ROOT / top).rglob("*.py"))

# What each part may import, beside itself. Every part may import `moe.config`, `moe.axes` and the parts of its row.
BELOW: dict[str, set[str]] = {}
_seen: set[str] = {"moe.config", "moe.axes"}
for _level in (
    ["moe.param"],
    ["moe.kernels"],
    ["moe.routing"],
    ["moe.balance", "moe.dispatch"],
    ["moe.layers"],
    ["moe.models"],
    ["moe.optim", "moe.data", "moe.upcycle", "moe.interop", "moe.plan"],
    ["moe.train"],
    ["moe.analysis"],
    ["configs"],
    ["launch"],
):
    for _part in _level:
        BELOW[_part] = set(_seen)
    _seen |= set(_level)
BELOW |= {"moe.config": set(), "moe.axes": {"moe.config"}}
SEES_THE_ROUTING_CONTRACT_ALONE = ("moe.balance", "moe.dispatch")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "moe" else parts[0]


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Modules of ours that a file imports, wherever the import stands; `from moe import axes` is `moe.axes`."""
    names = {module_of(path) for path in FILES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {package}"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in names else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] in ("moe", "configs", "launch"))


def problems(module: str, source: str) -> list[str]:
    part, out = part_of(module), []
    for name in imports(ast.parse(source), module):
        target = part_of(name)
        if target == part or name == "moe" or module == "moe":
            continue
        if target not in BELOW.get(part, set()):
            out.append(f"{module} imports {name}")
        if part in SEES_THE_ROUTING_CONTRACT_ALONE and target == "moe.routing" and name != "moe.routing.base":
            out.append(f"{module} imports {name}: of routing it may see the contract alone")
    return out


each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


@each_file
def test_imports_go_down_only(path: Path) -> None:
    assert not problems(module_of(path), path.read_text())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("moe.routing.topk", "from moe.dispatch.base import ExpertWeights"),
        ("moe.balance.z_loss", "from moe.routing.topk import TopK"),
        ("moe.dispatch.dense", "from moe.balance import Statistics"),
        ("moe.layers.moe", "import moe.train.loss"),
        ("moe.models.decoder", "def f():\n    from moe.train import run"),
        ("moe.axes", "from moe import param"),
        ("moe.train.loop", "from configs import base"),
        ("configs.debug", "from launch import train"),
    ],
)
def test_an_upward_import_is_seen(module: str, line: str) -> None:
    assert problems(module, line)


def test_every_part_has_its_place() -> None:
    parts = {part_of(module_of(path)) for path in FILES} - {"moe"}
    assert parts <= set(BELOW), f"add {sorted(parts - set(BELOW))} to the list of levels"


@each_file
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} has more than 60 lines"


@each_file
def test_no_drawer_for_odds_and_ends(path: Path) -> None:
    assert path.stem not in ("utils", "util", "common", "helpers", "misc")


@each_file
def test_the_library_reads_no_environment_and_prints_nothing(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "moe":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "breakpoint"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            assert name not in ("os.environ", "os.getenv", "os.putenv", "sys.argv"), f"{name}, line {node.lineno}"


@each_file
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except, line {node.lineno}"


def test_methods_name_their_source_and_their_difference_from_it() -> None:
    for path in FILES:
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        if "arXiv" in doc or "Source:" in doc:
            assert re.search(r"Differs from", doc), f"{path.relative_to(ROOT)} names a source without 'Differs from'"
