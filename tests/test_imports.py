"""The rules of the house that a reader of one file cannot see: imports go down only, files and functions stay short."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for top in ("moe", "configs", "launch") for path in (ROOT / top).rglob("*.py"))

# What each part may import, beside itself. Every part may import `moe.config`, `moe.axes` and the parts of its row.
BELOW: dict[str, set[str]] = {}
_seen: set[str] = {"moe.config", "moe.folding", "moe.axes"}
for _level in (
    ["moe.param"],
    ["moe.kernels"],
    ["moe.routing"],
    ["moe.balance", "moe.dispatch"],
    ["moe.layers"],
    ["moe.models"],
    ["moe.optim", "moe.data", "moe.upcycle", "moe.interop", "moe.plan", "moe.cluster"],
    ["moe.train"],
    ["moe.sweep"],
    ["moe.analysis"],
    ["configs"],
    ["launch"],
):
    for _part in _level:
        BELOW[_part] = set(_seen)
    _seen |= set(_level)
BELOW |= {"moe.config": set(), "moe.folding": {"moe.config"}, "moe.axes": {"moe.config", "moe.folding"}}
BELOW["moe.data"] = {"moe.config"}  # text in, arrays out: it knows of no model and no mesh
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
        if target == part or module == "moe":
            continue
        if name == "moe":  # its `load` sees everything below; it is for notebooks and launchers
            out += [f"{module} imports moe"] if part != "launch" else []
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
        ("moe.data.corpus", "from moe import axes"),
        ("moe.data.corpus", "from moe.models import Decoder"),
        ("moe.plan.flops", "from moe.optim import AdamWConfig"),
        ("moe.balance.scope", "from moe.routing import topk"),
        ("moe.layers.norm", "import moe"),
        ("moe.layers.norm", "from moe import load"),
        ("moe.layers.norm", "from moe import train"),
        ("moe.config", "import jax\nfrom moe.axes import spec"),
        ("moe.analysis.report", "from moe.newcomer import thing"),
        ("moe.newcomer.thing", "from moe import config"),
    ],
)
def test_an_upward_import_is_seen(module: str, line: str) -> None:
    assert problems(module, line)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("moe.dispatch.dense", "from moe.routing.base import Routing\nfrom moe.routing import base"),
        ("moe.dispatch.dense", "from moe.kernels.grouped import permute\nfrom moe import axes"),
        ("moe.data.corpus", "from moe.config import check\nfrom moe import config\nfrom moe.data.files import x"),
        ("launch.generate", "import moe\nfrom configs import debug"),
        ("moe", "from moe.train.load import load"),
    ],
)
def test_a_downward_import_passes(module: str, line: str) -> None:
    assert not problems(module, line)


def test_the_config_module_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse((ROOT / "moe" / "config.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_every_part_has_its_place() -> None:
    parts = {part_of(module_of(path)) for path in FILES} - {"moe"}
    assert parts <= set(BELOW), f"add {sorted(parts - set(BELOW))} to the list of levels"


def untidy(name: str, text: str) -> list[str]:
    """What the house does not want in the file `name`, a path from the root."""
    library, out = name.startswith("moe/"), []
    if Path(name).stem in ("utils", "util", "common", "helpers", "misc"):
        out.append("a drawer for odds and ends")
    if len(text.splitlines()) > 300:
        out.append("more than 300 lines")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno >= 60:
                out.append(f"{node.name} has more than 60 lines")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            out.append(f"bare except, line {node.lineno}")
        elif not library:
            continue
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("print", "input", "breakpoint"):
                out.append(f"{node.func.id}, line {node.lineno}")
        elif isinstance(node, ast.Attribute):
            if (read := ast.unparse(node)) in ("os.environ", "os.getenv", "os.putenv", "sys.argv"):
                out.append(f"{read}, line {node.lineno}")
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "sys"):
            taken = {alias.name for alias in node.names} & {"environ", "getenv", "putenv", "argv"}
            out += [f"{name}, line {node.lineno}" for name in sorted(taken)]
    return out


@each_file
def test_the_file_keeps_the_rules_of_the_house(path: Path) -> None:
    assert not untidy(path.relative_to(ROOT).as_posix(), path.read_text())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("moe/layers/utils.py", ""),
        ("launch/common.py", ""),
        ("moe/a.py", "\n" * 301),
        ("launch/a.py", "def f():\n" + "    x = 1\n" * 60),
        ("launch/a.py", "class C:\n    async def f():\n" + "        x = 1\n" * 60),
        ("launch/a.py", "try:\n    pass\nexcept:\n    pass"),
        ("moe/a.py", "print('here')"),
        ("moe/a.py", "import os\nx = os.environ['X']"),
        ("moe/a.py", "import os\nx = os.getenv('X')"),
        ("moe/a.py", "from os import environ"),
        ("moe/a.py", "import sys\nx = sys.argv[1:]"),
    ],
)
def test_what_the_house_does_not_want_is_seen(name: str, text: str) -> None:
    assert len(untidy(name, text)) == 1


def test_a_launcher_may_print_and_read_its_words() -> None:
    assert not untidy("launch/a.py", "import sys\n\n\ndef f():\n    print(sys.argv)\n" + "    x = 1\n" * 58)


def test_methods_name_their_source_and_their_difference_from_it() -> None:
    for path in FILES:
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        if "arXiv" in doc or "Source:" in doc:
            assert re.search(r"Differs from", doc), f"{path.relative_to(ROOT)} names a source without 'Differs from'"
