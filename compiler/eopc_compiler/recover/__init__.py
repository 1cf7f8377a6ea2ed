"""Recovery: distil a pruned model from the dense one, within minutes, on the calibration text.

* `recover` trains one pruned model (settings.py, distil.py);
* `recover_ladder` trains the weights that all tiers of a nested ladder share (joint.py);
* `training_windows` cuts the text (text.py).

Both run on the loop of train.py, whose clock is the budget: the step size decays with the minutes spent, the best
weights on selection text are kept, and a killed run goes on from its last state file (store.py).
"""

from eopc_compiler.recover.distil import RecoverReport, recover
from eopc_compiler.recover.joint import LadderReport, recover_ladder
from eopc_compiler.recover.settings import RecoverSettings
from eopc_compiler.recover.text import RECOVERY_TOKENS, TrainingText, training_windows

__all__ = [
    "RECOVERY_TOKENS",
    "LadderReport",
    "RecoverReport",
    "RecoverSettings",
    "TrainingText",
    "recover",
    "recover_ladder",
    "training_windows",
]
