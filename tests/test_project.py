"""Promises about the project as a whole: the direction of imports, what an import costs, versions, types, documentation."""

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import trl_sharelora


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_sharelora"
# A module may import what stands on its own level or below; `trl` belongs to levels 3 and 4.
LEVELS = {
    "empirical_bayes": 0,
    "errors": 0,
    "held_out": 0,
    "pessimism": 0,
    "subspace": 0,
    "users": 0,
    "sharelora": 1,
    "comparison": 2,
    "confidence": 2,
    "data": 2,
    "doctor": 2,
    "evaluation": 2,
    "export": 2,
    "forget": 2,
    "importers": 2,
    "new_users": 2,
    "rewards": 2,
    "scoring": 2,
    "shrinkage": 2,
    "splits": 2,
    "starts": 2,
    "usage": 2,
    "trainers": 3,
    "scripts": 4,
    "cli": 4,
    "demo": 4,
}
LEVEL_OF_TRL = 3
ALLOWED_AT_LEVEL_0 = sys.stdlib_module_names | {"numpy", "torch"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: `sharelora` for `sharelora/layer.py`, `cli` for `cli.py`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at its top or inside its functions."""
    package = [*path.relative_to(ROOT).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*parts, *([node.module] if node.module else [])])
            # `from . import data` names a module too
            names.update({stem} if node.module else {f"{stem}.{alias.name}" for alias in node.names})
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    level = LEVELS[part_of(path)]
    for name in imported_modules(path):
        first, *rest = name.split(".")
        if first == "trl_sharelora" and rest and rest[0] in LEVELS:
            assert LEVELS[rest[0]] <= level, f"{path} (level {level}) imports {name} (level {LEVELS[rest[0]]})"
        if first == "trl":
            assert level >= LEVEL_OF_TRL, f"{path} (level {level}) imports {name}"
        if level == 0 and first != "trl_sharelora":
            assert first in ALLOWED_AT_LEVEL_0, f"{path} (level 0) imports {name}"


def test_every_part_of_the_package_has_a_level():
    assert {part_of(path) for path in modules()} == set(LEVELS)


def test_the_reader_of_imports_sees_all_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "trl_sharelora" / "sharelora" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os, trl.trainer\nfrom ..data import a\nfrom .. import export\nfrom .layer import b\nfrom . import bank\n"
        "def f():\n    from trl import c\n    from ..trainers.reward import d\n"
    )
    assert imported_modules(file) == {
        "os",
        "trl",
        "trl.trainer",
        "trl_sharelora.data",
        "trl_sharelora.export",
        "trl_sharelora.sharelora.layer",
        "trl_sharelora.sharelora.bank",
        "trl_sharelora.trainers.reward",
    }


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after running `code`."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys; print(json.dumps(list(sys.modules)))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_package_registers_the_adapter_and_does_not_import_trl():
    loaded = modules_after(
        "import trl_sharelora\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as mapping\n"
        "assert mapping['SHARELORA'] is trl_sharelora.ShareLoraConfig"
    )
    assert "trl_sharelora.sharelora.model" in loaded
    assert not {name for name in loaded if name == "trl" or name.startswith("trl.")}
    assert not {name for name in loaded if name.startswith(("trl_sharelora.trainers", "trl_sharelora.scripts"))}


def test_the_version_is_written_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE) == [trl_sharelora.__version__]
    # the installed metadata come from there
    assert version("trl-sharelora") == trl_sharelora.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [trl_sharelora.__version__]
    assert f"## [{trl_sharelora.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_every_public_name_is_documented():
    undocumented = []
    for name in trl_sharelora.__all__:
        value = getattr(trl_sharelora, name)
        doc = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
        # a dataclass without a docstring gets its signature as one
        if not doc or doc.startswith(f"{name}("):
            undocumented.append(name)
    assert not undocumented
    assert set(trl_sharelora.__all__) <= set(dir(trl_sharelora))


def test_dependencies_are_pinned_for_tests_within_their_ranges():
    """Every direct dependency has an exact pin, and the pin satisfies what pyproject.toml asks for."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints" / "tested.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.replace("-", "_").lower().split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["test"], *extras["report"], *extras["quantization"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.replace("-", "_").lower()]), text


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_what_there_is_to_make():
    run = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "check", "bench"):
        assert re.search(rf"^  {target} +\w", run.stdout, flags=re.MULTILINE)
