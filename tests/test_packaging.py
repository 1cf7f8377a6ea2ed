"""What users install: both packages, the device profiles, nothing else, and no torch underneath."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "tensorrt", "safetensors", "huggingface-hub"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content["project"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy of the sources."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("building a wheel needs hatchling: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    hidden = shutil.ignore_patterns("__pycache__", ".git", ".*_cache", ".venv", "*.eopc", ".hypothesis")
    shutil.copytree(ROOT, source, symlinks=True, ignore=hidden)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", folder, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_profiles_are_readable_as_package_data() -> None:
    """Every profile of the repository is found through importlib.resources and is JSON with the name of its file."""
    folder = resources.files("eopc_runtime") / "_profiles"
    for here, there, key in (
        (folder, ROOT / "profiles", "name"),
        (folder / "measured", ROOT / "profiles" / "measured", "device"),
    ):
        found = {e.name: json.loads(e.read_text(encoding="utf-8")) for e in here.iterdir() if e.is_file()}
        assert set(found) == {path.name for path in there.glob("*.json")}
        assert "orin.json" in found
        for name, content in found.items():
            assert f"{content[key]}.json" == name


def test_base_install_is_light(project: dict[str, Any]) -> None:
    """A board needs no torch, and gets no runtime it did not ask for."""
    assert not names(project["dependencies"]) & HEAVY
    assert names(project["dependencies"]) == {"numpy", "tokenizers", "jinja2", "click"}


def test_compiler_extra_brings_torch(project: dict[str, Any]) -> None:
    """The twin of the test above: the names are read correctly."""
    assert {"torch", "transformers", "onnx"} <= names(project["optional-dependencies"]["compiler"])


def test_wheel_holds_both_packages_and_the_profiles(wheel_names: list[str]) -> None:
    """Modules, profiles behind the symlink, licence."""
    modules = {
        str(path.relative_to(ROOT / top))
        for top in ("runtime", "compiler")
        for path in (ROOT / top).rglob("*.py")
        if "_profiles" not in path.parts
    }
    assert modules <= set(wheel_names)
    assert {"eopc_runtime/report/page.html", "eopc_runtime/report/page.css"} <= set(wheel_names)
    profiles = {
        f"eopc_runtime/_profiles/{path.relative_to(ROOT / 'profiles')}" for path in (ROOT / "profiles").rglob("*.json")
    }
    assert "eopc_runtime/_profiles/measured/orin.json" in profiles
    assert profiles <= set(wheel_names)
    assert "eopc_runtime/power/boards.json" in wheel_names
    assert "eopc_runtime/serve/page.html" in wheel_names
    lists = (ROOT / "compiler" / "eopc_compiler" / "board" / "allow_lists").glob("*.json")
    assert {f"eopc_compiler/board/allow_lists/{path.name}" for path in lists} <= set(wheel_names)
    assert "eopc_compiler/board/allow_lists/tensorrt-10.3.json" in wheel_names
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_wheel_holds_nothing_else(wheel_names: list[str]) -> None:
    """No tests, notes or build outputs travel along."""
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"eopc_runtime", "eopc_compiler"}
    assert not [name for name in wheel_names if "test" in Path(name).name or name.endswith((".pyc", ".onnx", ".bin"))]


def names(requirements: list[str]) -> set[str]:
    """Distribution names of requirement lines."""
    return {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower().replace("_", "-") for line in requirements}
