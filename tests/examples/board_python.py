"""Python as a board has it: no compiler packages, and /sys, /etc, /proc/device-tree of the folder EOPC_TEST_BOARD.

    python board_python.py eopc ARGUMENTS...     the command line
    python board_python.py SCRIPT ARGUMENTS...   a script that uses the runtime

Windows of a meter are shortened, since the tiny model of the tests makes short sequences; nothing else is changed.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

BLOCKED = ["torch", "transformers", "onnx", "onnxscript", "safetensors", "huggingface_hub", "gguf", "tensorrt"]
WINDOW_S, LEAD_IN_S, IDLE_S = 0.15, 0.0, 0.5
PATIENT = 100  # periods and seconds without a reading: this is no test of a busy machine


def become_a_board(root: Path) -> None:
    """Block imports, look for the device below root, and take short windows."""
    sys.modules.update(dict.fromkeys(BLOCKED))  # type: ignore[arg-type]  # None: the import fails
    from eopc_runtime.calibration import calibrate, conditions, measure
    from eopc_runtime.power import base, probe, sampling

    for kind in (conditions.Place, probe.Surroundings):  # both look below "/" unless told otherwise
        defaults = kind.__init__.__defaults__
        assert defaults is not None
        assert Path("/") in defaults
        kind.__init__.__defaults__ = tuple(root if value == Path("/") else value for value in defaults)
    for module in (base, measure, sampling):
        module.MIN_WINDOW_S = WINDOW_S  # type: ignore[attr-defined]
    sampling.MIN_SAMPLES, sampling.MAX_GAP_PERIODS, sampling.LOST_AFTER_S = 1, PATIENT, PATIENT
    measure.METER_WINDOW_S, measure.LEAD_IN_S = WINDOW_S, LEAD_IN_S
    calibrate.Settings.__init__.__defaults__ = tuple(
        IDLE_S if value == calibrate.IDLE_S else value for value in calibrate.Settings.__init__.__defaults__ or ()
    )


if __name__ == "__main__":
    become_a_board(Path(os.environ["EOPC_TEST_BOARD"]))
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "eopc":
        runpy.run_module("eopc_runtime.cli", run_name="__main__")
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
