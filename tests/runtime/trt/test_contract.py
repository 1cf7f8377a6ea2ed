"""What the runner and the builder use of TensorRT and CUDA exists there: 10.3 and 11.4 as listed, TensorRT-RTX itself.

The lists in api/ are read from NVIDIA's own bindings by tools/tensorrt_api.py, which needs no GPU.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from eopc_runtime.runners.tensorrt import api

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RUNNER = ROOT / "runtime/eopc_runtime/runners/tensorrt"
BOARD = ROOT / "compiler/eopc_compiler/board"
LISTS = sorted((HERE / "api").glob("*.json"))
CLASSES = {"Context": "IExecutionContext", "Engine": "ICudaEngine", "Runtime": "Runtime"}
# the names the builder gives to TensorRT's objects
OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "shapes": "IOptimizationProfile",
}
# used on TensorRT-RTX alone, or after a look at whether it is there
GUARDED = {
    "ComputeCapability",
    "IAttentionInputLayer",
    "LayerInformationFormat",
    "config.num_compute_capabilities",
    "config.set_compute_capability",
}
Api = dict[str, dict[str, list[str]]]


@pytest.fixture(params=[*(path.stem for path in LISTS), "tensorrt-rtx"])
def listed(request: pytest.FixtureRequest) -> Api:
    """Members of classes with the signatures of methods, of one release."""
    if request.param != "tensorrt-rtx":
        classes: Api = json.loads((HERE / "api" / f"{request.param}.json").read_text())["classes"]
        return classes
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason='needs TensorRT-RTX: pip install "eopc[tensorrt-rtx]"')
    return {name: members_of(kind) for name, kind in vars(trt.tensorrt_rtx).items() if inspect.isclass(kind)}


def members_of(kind: Any) -> dict[str, list[str]]:
    """Members of a live class, with the signature lines of their docstrings."""
    found = {name: inspect.getdoc(inspect.getattr_static(kind, name)) or "" for name in dir(kind)}
    return {
        name: re.findall(rf"^(?:\d+\. )?({re.escape(name)}\((?!\*args).*)$", doc, re.MULTILINE)
        for name, doc in found.items()
        if not name.startswith("_")
    }


def test_the_lists_are_there() -> None:
    """The two ends of what is supported: JetPack 6 has 10.3, JetPack 7 has 11.4."""
    assert [path.stem for path in LISTS] == ["tensorrt-10.3", "tensorrt-11.4"]


@pytest.mark.parametrize("name", CLASSES)
def test_every_member_of_a_protocol_exists_and_takes_these_arguments(name: str, listed: Api) -> None:
    """mypy holds the runner to the protocols; this holds the protocols to TensorRT."""
    members = {n: m for n, m in vars(getattr(api, name)).items() if not n.startswith("_")}
    assert members
    for member, ours in members.items():
        assert member in listed[CLASSES[name]], f"{CLASSES[name]} has no {member}"
        theirs = listed[CLASSES[name]][member]
        if isinstance(ours, property):
            assert not theirs, f"{member} is a method"
            continue
        count = len(inspect.signature(ours).parameters)  # with self
        assert any(low <= count <= high for low, high in map(arity, theirs)), f"{member}: {theirs}"


@pytest.mark.parametrize("path", [*sorted(RUNNER.glob("*.py")), *sorted(BOARD.glob("*.py"))], ids=lambda p: p.stem)
def test_every_name_taken_from_the_module_exists(path: Path, listed: Api) -> None:
    """`trt.X` and `trt.X.Y` in the source, classes and members of enumerations."""
    for chain in chains(path, "trt"):
        name, *rest = chain
        if not name[0].isupper() or name in GUARDED:  # classes; a variable of this name may be something else
            continue
        assert name in listed, f"TensorRT has no {name}"
        assert not rest or rest[0] in listed[name] or rest[0].startswith("__"), f"{name} has no {rest[0]}"


@pytest.mark.parametrize("path", sorted(BOARD.glob("*.py")), ids=lambda p: p.stem)
def test_every_member_the_builder_uses_exists(path: Path, listed: Api) -> None:
    """By the names that the builder gives to TensorRT's objects."""
    if not list(chains(path, "trt")):
        return
    for variable, kind in OBJECTS.items():
        for member, *_ in chains(path, variable):
            if f"{variable}.{member}" not in GUARDED:
                assert member in listed[kind], f"{kind} has no {member}"


def test_cuda_python_has_what_the_runner_calls() -> None:
    """Functions and enumerations of cuda.bindings.runtime; without a driver they answer with a code."""
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install cuda-bindings")
    used = {name for name, *_ in chains(RUNNER / "cuda.py", "_cuda")}
    assert len(used) > 15
    assert [name for name in sorted(used) if not hasattr(cuda, name)] == []
    assert isinstance(int(cuda.cudaMalloc(256)[0]), int)
    assert cuda.cudaGetErrorString(cuda.cudaError_t.cudaErrorNoDevice)[1].decode()


def test_the_fake_has_what_the_runner_calls(fake_cuda: Any) -> None:
    """The same, so that the fake does not fall behind."""
    used = {name for name, *_ in chains(RUNNER / "cuda.py", "_cuda")}
    assert len(used) > 15
    assert [name for name in sorted(used) if not hasattr(fake_cuda.FakeCuda, name)] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f(self: A, name: str, shape: tuple[int, int]) -> bool", (3, 3)),
        ("g(self: A, s: B = <B.STATIC: 0>, n: int = 1) -> C", (1, 3)),
        ("h(self: A) -> None", (1, 1)),
    ],
)
def test_arity_reads_signatures(line: str, expected: tuple[int, int]) -> None:
    """Brackets and defaults."""
    assert arity(line) == expected


def test_chains_sees_what_is_used(tmp_path: Path) -> None:
    """The negative twin: a member that does not exist is found."""
    source = tmp_path / "a.py"
    source.write_text("def f(self, trt):\n    return trt.Builder.nothing(self.trt.Runtime)\n")
    assert sorted(chains(source, "trt")) == [("Builder", "nothing"), ("Runtime",)]


def arity(signature: str) -> tuple[int, int]:
    """Fewest and most positional arguments of a pybind11 signature, self among them."""
    inner = signature[signature.index("(") + 1 : signature.rindex(")")]
    flat = inner
    while (shorter := re.sub(r"[\[<(][^\[\]<>()]*[\])>]", "", flat)) != flat:
        flat = shorter
    parts = [part for part in flat.split(",") if part.strip()]
    return sum("=" not in part for part in parts), len(parts)


def chains(path: Path, variable: str) -> list[tuple[str, ...]]:
    """Attributes of a variable, or of self's, in a source file; the longest chain of each: trt.A.B gives (A, B)."""
    found, inner = [], set()
    for node in ast.walk(ast.parse(path.read_text())):  # outer nodes come first
        names: list[str] = []
        top = node
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
            inner.add(node)
        if names and top not in inner and isinstance(node, ast.Name):
            whole = [*([] if node.id == "self" else [node.id]), *names]
            if whole[0] == variable and len(whole) > 1:
                found.append(tuple(whole[1:]))
    return found
