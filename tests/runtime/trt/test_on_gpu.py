"""On a real GPU: engines are built, agree with ONNX Runtime, and survive what crashed others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from eopc_runtime.bundle import Bundle
from eopc_runtime.cli.main import cli
from eopc_runtime.gpu_probe import probe_gpu
from eopc_runtime.runners.choose import open_tensorrt

DEVICES = {86: "rtx-3060", 87: "orin", 89: "rtx-4090", 90: "h100", 120: "rtx-5090"}


@pytest.mark.gpu
def test_engines_on_this_gpu(
    tiny_checkpoint: Path, build_settings: Callable[..., Any], tmp_path: Path, record_property: Callable[..., None]
) -> None:
    """Built and checked by the command; then 1000 tokens with prefill between captured decodes, and a move down."""
    report = probe_gpu()
    if not report.devices or report.devices[0].compute_capability not in DEVICES:
        pytest.skip(f"needs a GPU of {', '.join(DEVICES.values())}: {report.missing or report.devices}")
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings of the driver's CUDA version")
    from eopc_compiler.build import build

    device = DEVICES[report.devices[0].compute_capability]
    root = tmp_path / "tiny.eopc"
    build(build_settings(tiny_checkpoint, root, device=device, precision=("fp16",), context=512, budgets_j=(1e6,)))
    done = CliRunner().invoke(cli, ["engine", str(root), "--device", device, "--check", "--json"])
    assert done.exit_code == 0, done.stderr
    record_property("checks", done.stdout)

    pool: Any = open_tensorrt(Bundle.open(root)).pool
    tiers = [info.tier for info in Bundle.open(root).manifest.tiers]
    for turn in range(10):
        runner = pool.get(tiers[0])
        cache = runner.new_cache()
        for _ in range(10):
            runner.forward(cache, list(range(turn, turn + 20)))
            for token in range(10):
                logits = runner.forward(cache, [token])
        cache = pool.get(tiers[-1]).adopt(cache)
        assert pool.get(tiers[-1]).forward(cache, [1]).shape == logits.shape
    assert pool.notes == (), "the decode step was captured"
    pool.close()
