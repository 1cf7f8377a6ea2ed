"""The dialect of a build: the one asked for, else the device's first that carries the precision, and a word on why."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest

from eopc_compiler.pipeline import choose_dialect
from eopc_compiler.state import BuildArgs, CompileState
from eopc_runtime.errors import DeviceError
from eopc_runtime.profiles import DeviceProfile, load_profile


def chosen(profile: DeviceProfile, *precision: str, dialect: str | None = None) -> tuple[str, list[str]]:
    """The name of the dialect, and what was said."""
    said: list[str] = []
    args = BuildArgs(device=profile.name, precision=precision, dialect=dialect)
    state = choose_dialect(CompileState(args, None, profile, said.append, said.append))  # type: ignore[arg-type]  # no cache
    assert state.dialect is not None
    return state.dialect.name, said


def primitive_alone(precision: str) -> DeviceProfile:
    """orin, if one precision were to be had in its second dialect only."""
    orin = load_profile("orin")
    entry = replace(orin.precisions[precision], dialects=("primitive",))
    return replace(orin, precisions=MappingProxyType({**orin.precisions, precision: entry}))


def test_a_dialect_that_was_asked_for_needs_no_reason() -> None:
    """int8 runs in both dialects of orin: --dialect primitive is the user's choice, not a need of int8."""
    orin = load_profile("orin")
    assert chosen(orin, "int8", dialect="primitive") == ("primitive", [])
    assert chosen(orin, "auto", dialect="primitive") == ("primitive", [])
    assert chosen(orin, "int8") == ("native", [])


def test_another_dialect_than_the_devices_first_is_explained() -> None:
    """Where only the second one carries the precision asked for; `auto` asks for none."""
    profile = primitive_alone("int8")
    why = "int8 needs the primitive dialect on orin (see eopc devices)"
    assert chosen(profile, "auto", "int8") == ("primitive", [why])
    assert chosen(profile, "int8", dialect="primitive") == ("primitive", [])


def test_what_no_dialect_carries_is_refused() -> None:
    """A dialect the device does not take, a precision the dialect does not carry, and two that no dialect has both."""
    with pytest.raises(DeviceError, match=r"h100 takes the native dialect, not primitive\."):
        chosen(load_profile("h100"), "auto", dialect="primitive")
    with pytest.raises(DeviceError, match=r"orin runs int4 only in the native dialect, not in primitive\. Choose fp16"):
        chosen(load_profile("orin"), "int4", dialect="primitive")
    with pytest.raises(DeviceError, match="orin runs int8 only in the primitive dialect, not in native"):
        chosen(primitive_alone("int8"), "int4", "int8")
