"""What a mask costs in joules: how the model would be stored, and the price of the reference workload."""

from __future__ import annotations

from eopc_compiler.ladder import Mask, full_mask
from eopc_compiler.selector import Selector
from eopc_compiler.state import CompileState
from eopc_compiler.storage import Storage
from eopc_compiler.token_selector import PromptPath
from eopc_runtime.prior import prior_energy, prior_table

LEAST_GROUP, LARGEST_GROUP = 16, 64  # channels turned together: fewer even little out, more take longer


def storage_for(state: CompileState, precision: str) -> Storage:
    """How a precision is stored for this model, device and dialect."""
    assert state.dialect is not None
    config = state.config
    q_widths = {d.num_key_value_heads * config.query_group_size * config.head_dim for d in config.layers}
    widths = {config.hidden_size, config.query_group_size * config.head_dim, state.align, *q_widths}
    profile, layers = state.profile, len(config.layers)
    static = profile.precision(precision).static_inputs
    group = min(LARGEST_GROUP, state.align & -state.align)  # a power of two that no tier cuts
    by_token = static and precision == "int8" and group >= LEAST_GROUP and state.args.selectors != "on"
    choice = (precision, profile.compute_dtype, state.dialect, widths, layers, static)
    return Storage.choose(*choice, token_group=group if by_token else None)


def must_prune(state: CompileState) -> bool:
    """Whether some budget may be below the dense model's price, so that units have to be ranked."""
    if state.args.masks:
        return True  # which layers are repaired still depends on the curves
    return max(prices(state, full_mask(state.config)).values()) > min(state.args.budgets_j)


def prices(state: CompileState, mask: Mask) -> dict[str, float]:
    """Joules of the reference workload under a mask, in every precision that was asked for."""
    assert state.dialect is not None
    allowed = state.profile.precisions_for(state.dialect.name)
    wanted = allowed if "auto" in state.args.precision else state.args.precision
    return {precision: plan_energy(state, mask, storage_for(state, precision)) for precision in wanted}


def reference_energy(state: CompileState, mask: Mask, storage: Storage) -> float:
    """Joules of the reference workload, both phases on this tier."""
    work = state.args.workload
    energy = prior_energy(state.profile, "t0", storage.cost(state.config, mask), storage.precision)
    return energy.sequence_j(work.prompt_tokens, work.new_tokens)


def plan_energy(state: CompileState, mask: Mask, storage: Storage, path: PromptPath | None = None) -> float:
    """Joules of the reference workload, the prompt on the whole model and the answer on the tier.

    Args:
        path: how the prompt runs through the whole model; None for through all layers.
    """
    work = state.args.workload
    whole = storage.cost(state.config, full_mask(state.config), path)
    table = prior_table(state.profile, {"t0": whole, "t1": storage.cost(state.config, mask)}, storage.precision, 0.0)
    return table.plan_price_j(0, 1, work.prompt_tokens, work.new_tokens)


def selector_energy(state: CompileState, core: Mask, storage: Storage, selector: Selector) -> float:
    """The same of a tier that chooses channels: it reads its own prompts, through the whole model, and gathers."""
    work = state.args.workload
    energy = prior_energy(state.profile, "t0", storage.cost(state.config, core, None, selector), storage.precision)
    return energy.sequence_j(work.prompt_tokens, work.new_tokens)
