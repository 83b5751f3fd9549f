"""The rule of the house: the top level stands alone, and imports run one way."""
import ast
import importlib
import os
import shutil
import sys

import pytest

from helpers import ROOT, python

ARROWS = {"world": set(), "moe": set(), "fit_laws": set(), "model": {"moe"}, "data": {"world"},
          "train": {"model", "data"}}
PACKAGES = {"torch", "numpy", "tiktoken", "scipy", "tqdm"}
OPTIONAL = ("PIL", "matplotlib", "pyarrow")


def imported(path):
    """The first part of every module that a file imports, also inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", ARROWS)
def test_imports_of_the_top_level_run_one_way(name):
    found = {*imported(ROOT / f"{name}.py")} - sys.stdlib_module_names
    drawn = {"matplotlib"} if name == "fit_laws" else set()  # its figure, where it is installed
    assert found & (ARROWS.keys() | {"tools", "tests"}) == ARROWS[name]
    assert found <= ARROWS[name] | PACKAGES | drawn


def test_the_top_level_trains_and_fits_alone(tmp_path):
    """Copied into an empty folder, without the optional packages."""
    for name in ARROWS:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in OPTIONAL:
        (blocked / f"{name}.py").write_text("raise ImportError('not installed')", "utf-8")
    (tmp_path / "table.csv").write_text("N,D,loss\n" + "".join(
        f"{n},{d},{1.5 + 50 / n**0.3 + 80 / d**0.3}\n"
        for n in (1e5, 3e5, 1e6) for d in (1e6, 3e6, 1e7)), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    for command in ("world.py", "train.py --tokens 2K --width 16 --val-rows 2 --device cpu",
                    "fit_laws.py table.csv --bootstrap 5"):
        result = python(*command.split(), cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs/demo/results.jsonl").is_file()


TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_says_what_it_is_for(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"tools.{name}").main(["--help"])
    assert not stop.value.code and f"python -m tools.{name}" in capsys.readouterr().out


@pytest.mark.parametrize("checker", ["ruff check", "mypy"])
def test_the_checkers_find_nothing(checker):
    """With the settings of pyproject.toml."""
    done = python("-m", *checker.split())
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_files_read_in_one_sitting():
    """Lines of at most 100 columns, functions of at most 40 lines but the loop, nesting of 3."""
    nests = (ast.If, ast.For, ast.While, ast.With, ast.Try)

    def depth(node, d=0):
        return max([d] + [depth(child, d + isinstance(child, nests))
                          for child in ast.iter_child_nodes(node)])

    total = 0
    for name in ARROWS:
        lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
        total += len(lines)
        assert max(map(len, lines)) <= 100, name
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and node.name != "train":
                assert node.end_lineno - node.lineno < 40 and depth(node) <= 3, (name, node.name)
    assert total < 3180
