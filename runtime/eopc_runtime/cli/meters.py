"""Which power meter a command uses, and what executes the tiers here: shared by run, calibrate and validate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from eopc_runtime.bundle import Bundle
    from eopc_runtime.energy import EnergyTable
    from eopc_runtime.power.base import Meter
    from eopc_runtime.power.probe import Surroundings
    from eopc_runtime.provenance import Identity
    from eopc_runtime.runners.choose import Chosen

METER_NAMES = ("auto", "ina3221", "tegrastats", "nvml", "rapl", "proxy")

F = TypeVar("F", bound=Callable[..., Any])


def meter_options(default: str | None, *more: str, text: str) -> Callable[[F], F]:
    """Add --meter and --proxy-w to a command; `more` are further names for --meter."""

    def add(command: F) -> F:
        command = click.option(
            "--proxy-w",
            type=float,
            metavar="WATTS",
            help="Power that the proxy meter assumes. [default: that of the bundle's device profile, if it has one]",
        )(command)
        return click.option("--meter", type=click.Choice((*METER_NAMES, *more)), default=default, help=text)(command)

    return add


def open_meter_for(
    bundle: Bundle,
    name: str,
    proxy_w: float | None = None,
    *,
    measuring: bool = False,
    on_gpu: bool = False,
    around: Surroundings | None = None,
) -> Meter:
    """Open a meter that sees the work of a bundle's tiers; `measuring`: auto takes no proxy.

    NVML is passed over unless they run `on_gpu`: it reads a GPU, which would idle. DeviceError says what is missing.
    """
    from dataclasses import replace

    from eopc_runtime.errors import DeviceError
    from eopc_runtime.power.probe import Surroundings, choose_meter, open_meter

    def no_nvml() -> NoReturn:
        raise DeviceError("NVML reads the power of a GPU, and the tiers run on the CPU here.")

    watts = proxy_w if proxy_w is not None else assumed_watts(bundle)
    if measuring and name == "auto":
        watts = None
    around = replace(around or Surroundings(), proxy_w=watts)
    if not on_gpu:
        around = replace(around, import_nvml=no_nvml)
    if name != "auto":
        return open_meter(name, around)
    choice = choose_meter(around)
    if choice.meter.sensor.name != "none":
        return choice.meter
    choice.meter.close()
    reasons = "".join(f"\n  {entry.meter}: {entry.reason}" for entry in choice.passed_over)
    raise DeviceError(
        f"There is no power meter here. Passed over:{reasons}\n"
        "`eopc doctor` says what is missing. To fit time x an assumed power instead, add --meter proxy --proxy-w WATTS."
    )


def meter_of_run(
    bundle: Bundle, name: str | None, budget: bool, proxy_w: float | None = None, *, on_gpu: bool = False
) -> Meter | None:
    """Return the meter that corrects a running sequence, or None.

    Without a name it is the one that measures here, if there is one and a budget to keep. DeviceError when one was
    asked for and is not to be had; UsageError for assumed watts under prices that were measured.
    """
    from eopc_runtime.errors import DeviceError, UsageError

    if name == "none" or (name is None and not budget):
        return None
    if name == "proxy" and bundle.energy.source != "proxy":
        raise UsageError(
            f"The prices are {bundle.energy.source} joules, and a proxy counts others: time x an assumed power. "
            "Leave out --meter proxy."
        )
    try:
        return open_meter_for(bundle, name or "auto", proxy_w, measuring=True, on_gpu=on_gpu)
    except DeviceError:
        if name is not None:
            raise
        return None


def prices_here(
    bundle: Bundle, threads: int | None, rails: Sequence[str] | None, strict: bool, chosen: Chosen | None = None
) -> tuple[EnergyTable, str | None]:
    """Return the prices for this device in its present power mode, and a warning where they are of another.

    Under a strict budget that is a DeviceError.
    """
    from eopc_runtime.errors import DeviceError

    table = bundle.energy
    if table.calibration is None and not table.other_modes:
        return table, None
    try:
        return table.on(identity_here(bundle, threads, rails, chosen)), None
    except DeviceError as error:
        if strict:
            raise
        return table, str(error)


def assumed_watts(bundle: Bundle) -> float | None:
    """Return the power a proxy assumes for the bundle's device, None where its profile assumes none."""
    from eopc_runtime.errors import DeviceError
    from eopc_runtime.profiles import load_profile

    try:
        profile = load_profile(bundle.manifest.device)
    except DeviceError:  # a device of another eopc
        return None
    return profile.constant("idle_w") if profile.energy_source == "proxy" else None


def runner_name(threads: int | None, chosen: Chosen | None = None) -> str:
    """Return what executes the tiers here: prices of another version or number of threads are other prices."""
    if chosen is not None and chosen.on_gpu:
        return chosen.version
    from eopc_runtime.cli.machine import installed, usable_cores

    return f"onnxruntime {installed('onnxruntime', 'onnxruntime-gpu')}, {threads or usable_cores()} threads"


def identity_here(
    bundle: Bundle, threads: int | None, rails: Sequence[str] | None = None, chosen: Chosen | None = None
) -> Identity:
    """Return the identity of this machine with the runner that `eopc run` uses, and the rails of an open meter."""
    from eopc_runtime.calibration.conditions import Place, read_conditions
    from eopc_runtime.calibration.identity import find_identity, fingerprint
    from eopc_runtime.cli.machine import cpu_model

    place = Place()
    return find_identity(
        place,
        read_conditions(place),
        runner=runner_name(threads, chosen),
        engine=fingerprint(bundle.manifest),
        rails=rails,
        module=cpu_model(),
    )
