"""What a build was asked to do, and what it knows so far: two frozen records that passes read and extend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eopc_compiler.cache import StageCache
from eopc_compiler.calibration import CalibrationSet, CalibSelect, Domain
from eopc_compiler.checkpoint import Checkpoint
from eopc_compiler.config import LlamaConfig
from eopc_compiler.dialects import Dialect
from eopc_compiler.extras import TierExtras
from eopc_compiler.importance import Observations, Report
from eopc_compiler.ladder import UnitOrder
from eopc_compiler.planner import TierPlan
from eopc_compiler.storage import Storage
from eopc_compiler.weight_table import WeightTable
from eopc_runtime.profiles import DeviceProfile

if TYPE_CHECKING:
    from eopc_compiler.tier_graphs import TierGraphs


@dataclass(frozen=True, slots=True)
class Workload:
    """The sequence budgets refer to: tokens in, tokens out."""

    prompt_tokens: int = 128
    new_tokens: int = 140

    def __str__(self) -> str:
        return f"{self.prompt_tokens}:{self.new_tokens}"


@dataclass(frozen=True, slots=True)
class BuildArgs:
    """Everything `eopc build` can be told; the CLI only parses into it."""

    model: str | None = None
    device: str = "orin"
    budgets_j: tuple[float, ...] = (20.0, 10.0, 5.0)
    output: Path = Path("bundle")
    workload: Workload = Workload()
    calib: tuple[str, ...] = ()
    calib_select: CalibSelect = "domains"
    own_text: bool = False  # that the model writes itself, beside the other calibration text, where tiers are pruned
    masks: tuple[Path, ...] = ()
    precision: tuple[str, ...] = ("auto",)
    dialect: str | None = None
    context: int = 2048
    seed: int = 0
    dry_run: bool = False
    resume: bool = True
    max_added_loss: float = 0.02  # nats per token that `--precision auto` may spend on the worst domain
    search_seconds: float = 30.0
    recover_minutes: float = 0.0  # of distilling the shared weights from the dense model
    proxy: str = "ends"  # which tiers are compiled without a GPU: the largest and the smallest ("ends"), "all", "none"
    prefill_depth: int | Literal["auto", "all"] = "auto"  # layers that prompts run through on one tier of the ladder
    prefill_tokens: float | Literal["auto", "none"] = "auto"  # share of their tokens that runs through the others
    selectors: Literal["auto", "on", "off"] = "auto"  # tiers that choose FFN channels by the prompt
    train_selectors_minutes: float = 0.0  # for each of them
    independent: bool = False  # every tier may have all its down_proj of its own
    calibration_windows: int = 12  # per domain, that statistics are taken from and candidates are fitted on
    repair_windows: int = 24  # the same, that the static tiers of the bundle are repaired on
    calibration_length: int = 256  # tokens

    @property
    def prompt_part(self) -> int:
        """Tokens of a calibration window that stand for the prompt when a handover is measured."""
        return self.calibration_length // 4

    @property
    def repair_part(self) -> int:
        """The same where a tier is repaired on the cache it inherits: few, as the rest is what it is fitted to.

        Repaired behind 64, 32, 16 and 8 of 256 tokens, 8 of 30 layers of SmolLM2-135M add 2.49, 2.46, 2.45 and 2.44
        nats to answers to prompts of 128; repaired on their own cache, 2.68 (masks and text of the README's ladder).
        """
        return max(2, self.calibration_length // 16)

    @property
    def choice_part(self) -> int:
        """The same where the prompt chooses channels: it has to show enough, and the answer has to be long enough."""
        return self.calibration_length // 2


@dataclass(frozen=True, slots=True)
class PrecisionTrial:
    """One candidate of `--precision`: its price, and the loss it adds to the dense model where that was measured."""

    precision: str
    energy_j: float
    added_loss: dict[str, float] | None  # by domain; None where a cheaper candidate made measuring needless
    chosen: bool


@dataclass(frozen=True, slots=True)
class CompileState:
    """What is known after a pass; every pass returns a new one."""

    args: BuildArgs
    cache: StageCache
    profile: DeviceProfile
    say: Callable[[str], None]  # progress: a line for every new thing
    tick: Callable[[str], None]  # progress: a count that replaces the last one
    checkpoint: Checkpoint | None = None
    domains: tuple[Domain, ...] = ()
    calibration: CalibrationSet | None = None
    selection: CalibrationSet | None = None
    heldout: CalibrationSet | None = None
    observations: Observations | None = None
    orders: tuple[UnitOrder, ...] = ()
    dialect: Dialect | None = None
    storage: Storage | None = None
    align: int = 64
    trials: tuple[PrecisionTrial, ...] = ()
    plan: tuple[TierPlan, ...] = ()
    dense_loss: dict[str, float] = field(default_factory=dict)  # nats per token, by SPLIT.DOMAIN
    weights: Path | None = None
    table: WeightTable | None = None
    bytes_by_type: dict[str, int] = field(default_factory=dict)
    scorers: dict[int, Path] = field(default_factory=dict)  # trained ones, by tier
    extras: tuple[TierExtras, ...] = ()
    graphs: tuple[TierGraphs, ...] = ()
    staged: Path | None = None  # the bundle before it is renamed into place
    tiers: tuple[dict[str, Any], ...] = ()

    @property
    def config(self) -> LlamaConfig:
        """The dense model's config."""
        assert self.checkpoint is not None, "load_checkpoint comes first"
        return self.checkpoint.config

    def counter(self, what: str, units: str = "layers") -> Report:
        """A reporter of (done, total) that writes to the progress line."""
        return lambda done, total: self.tick(f"{what}: {done}/{total} {units}")
