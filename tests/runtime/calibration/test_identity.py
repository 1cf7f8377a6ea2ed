"""What prices belong to, as read from the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eopc_runtime.calibration.conditions import Conditions, Place
from eopc_runtime.calibration.identity import find_identity, fingerprint, read_l4t, read_module
from eopc_runtime.calibration.publish import priced_manifest


def test_a_jetson_is_known_by_its_module_not_its_carrier(tmp_path: Path) -> None:
    """The device tree names the carrier board and the module; prices belong to the module."""
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    tree = b"nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0"
    (tmp_path / "proc/device-tree/compatible").write_bytes(tree)
    release = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
    (tmp_path / "etc/nv_tegra_release").write_text(release)
    (tmp_path / "sys/kernel/debug/bpmp/debug/clk/emc").mkdir(parents=True)
    (tmp_path / "sys/kernel/debug/bpmp/debug/clk/emc/max_rate").write_text("3199000000\n")
    found = find_identity(
        Place(tmp_path),
        Conditions(power_mode="MAXN", clocks="jetson_clocks"),
        runner="trt 10",
        engine="abc",
        rails=["VDD_IN"],
        module="not asked for",
    )
    assert (found.module, found.l4t, found.emc_mhz) == ("p3701-0005", "36.4.3", 3199.0)
    assert (found.power_mode, found.clocks, found.rails, found.batch) == ("MAXN", "jetson_clocks", ("VDD_IN",), 1)


def test_a_machine_without_a_device_tree_goes_by_the_name_it_is_given(tmp_path: Path) -> None:
    """Nothing is invented: release and memory clock are None."""
    assert read_module(tmp_path) is None
    assert read_l4t(tmp_path) is None
    found = find_identity(Place(tmp_path), Conditions(), runner="r", engine="e", module="Some CPU")
    assert (found.module, found.l4t, found.emc_mhz, found.power_mode, found.rails) == (
        "Some CPU",
        None,
        None,
        None,
        None,
    )


def test_the_fingerprint_follows_graphs_and_weights_but_not_prices(lab: Any) -> None:
    """New prices keep it, so that a calibration does not make itself invalid; another graph changes it."""
    manifest = lab.bundle.manifest
    before = fingerprint(manifest)
    assert fingerprint(priced_manifest(manifest, lab.bundle.energy, b"{}")) == before
    changed = [e for e in manifest.files if e.path != "tiers/t1/model.onnx"]
    assert fingerprint(replace(manifest, files=tuple(changed))) != before
