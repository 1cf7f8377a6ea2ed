"""The pass that fits what every pruned tier has of its own and writes its extras.bin."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from eopc_compiler.extras import EXTRAS_FILE, TierExtras
from eopc_compiler.ladder import tier_config
from eopc_compiler.planner import TierPlan, up_to
from eopc_compiler.selector_fit import with_scorers
from eopc_compiler.stage_selectors import read_scorers
from eopc_compiler.state import CompileState
from eopc_compiler.stored_model import deployed_model, fit, pruned_prompt, repair, repair_inputs
from eopc_compiler.tier_graphs import tier_path
from eopc_compiler.tier_repair import Repaired
from eopc_compiler.weights import WeightReader
from eopc_runtime.memory import release_memory


def repair_tiers(state: CompileState) -> CompileState:
    """Fit what every pruned tier has of its own, on the cache it inherits from t0, and write its extras.bin.

    On the weights as they are stored, so that rounding is made up for as well.
    """
    assert state.storage and state.table and state.weights
    storage, weights = state.storage, state.weights
    model = lru_cache(lambda: deployed_model(state, storage))  # once, and only if some tier is not in the cache

    @lru_cache
    def repaired(prefill: int) -> dict[int, tuple[Repaired, ...]]:
        """What all static tiers behind one prefill tier have of their own: the whole model runs once for them."""
        static = [i for i, t in enumerate(state.plan) if i and t.prefill == prefill and not t.fills]
        names = ", ".join(f"t{i}" for i in static)
        state.say(f"repairing {names} on the cache inherited from t{prefill}")
        pruned = pruned_prompt(state, storage, state.plan[prefill].prompt, model)
        ladders, count = [up_to(state.plan, i) for i in static], state.counter(f"repairing {names}")
        found = repair(state, model(), ladders, None, count, pruned)
        return {i: own for i, (_, own) in zip(static, found, strict=True)}

    extras: list[TierExtras] = [TierExtras.none()]
    for index, tier in enumerate(state.plan[1:], start=1):
        name = tier_path(index, EXTRAS_FILE)
        inputs = {
            **repair_inputs(state),
            "masks": [asdict(mask) for mask in up_to(state.plan, index)],
            "prompts": [p and asdict(p) for p in (tier.prompt, state.plan[tier.prefill].prompt)],
            "stand_for": state.args.workload.prompt_tokens,
            "selector": asdict(tier.selector) if tier.selector else None,
            "scorers": state.scorers[index].name if index in state.scorers else None,
            "file": name,
            "weights": weights.parent.name,
        }

        def produce(path: Path, tier: TierPlan = tier, name: str = name, index: int = index) -> None:
            path.mkdir()
            if tier.prompt is not None:
                pruned, config = pruned_prompt(state, storage, tier.prompt, model), tier_config(state.config, tier.mask)
                assert state.table and pruned
                TierExtras.write_prompt(path, name, state.table, WeightReader(weights), config, pruned)
            elif tier.selector is not None:
                state.say(f"fitting the channels of t{index}")
                report = state.counter(f"fitting t{index}")
                trained = read_scorers(state.scorers[index]) if index in state.scorers else None
                start, most = trained.start if trained else tier.selector, state.args.calibration_windows
                fitted = fit(state, model(), start, most, report)
                if trained:
                    fitted = with_scorers(fitted, trained.scorers)
                TierExtras.write_selector(path, name, model(), tier.selector, fitted, storage)
            else:
                TierExtras.write(path, name, repaired(tier.prefill)[index], storage)
            release_memory()

        extras.append(TierExtras.read(state.cache.get(f"extras-t{index}", inputs, "", produce), name))
    totals = Counter(state.bytes_by_type)
    for own in extras:
        totals.update(own.bytes_by_type)
    return replace(state, extras=tuple(extras), bytes_by_type=dict(totals))
