"""Device profiles: what a device allows and the constants its energy prior is computed from.

A profile is one JSON file in `profiles/`. Every constant carries its unit, a mark and a source:
`s` documented in a public source, `m` measured in public data (or fitted to it), `u` unconfirmed. A profile
may be `based_on` another one and state only what it knows better; what it inherits is marked `u`, because a
constant of one board is only a guess for the next. The rails of a board's power monitors, and which of them
make its total, are part of the profile too (see power.rails), and so is what compiles engines for an NVIDIA device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from eopc_runtime.errors import DeviceError
from eopc_runtime.jsonfields import Fields, did_you_mean, parse_json
from eopc_runtime.power.rails import RailRule, inherited, read_rails
from eopc_runtime.prior_error import PriorError

DIALECTS = ("primitive", "native")
PRECISIONS = ("fp32", "fp16", "fp8", "int8", "int4")
COMPUTE_DTYPES = ("float32", "float16")
ENGINE_COMPILERS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
MARKS = {"s": "documented", "m": "measured or fitted to measurements", "u": "unconfirmed"}

# The constants of the roofline prior (see energy.prior_energy) and the only unit each may be written in.
CONSTANT_UNITS = {
    "idle_w": "W",
    "bandwidth": "B/s",
    "flops": "FLOP/s",
    "prefill_efficiency": "share",
    "layer_s": "s",
    "fixed_s": "s",
    "j_per_byte": "J/B",
    "j_per_flop": "J/FLOP",
}
_MAY_BE_ZERO = ("layer_s", "fixed_s", "j_per_byte", "j_per_flop")


@dataclass(frozen=True, slots=True)
class Constant:
    """One number of a device with its unit, its mark (s, m or u) and where it comes from."""

    value: float
    unit: str
    mark: str
    source: str


@dataclass(frozen=True, slots=True)
class Precision:
    """A weight precision: the share of bandwidth decode reaches, and the dialects that carry it.

    With static inputs, inputs of int8 or fp8 matrices that come from a norm are rounded too, because the device
    multiplies codes by codes faster than it unpacks weights. `unpack_j` are joules per weight and pass beside its
    bytes, to turn a quantised weight into a number; None where nothing is known of it, and the prior leaves it out.
    """

    decode_efficiency: Constant
    dialects: tuple[str, ...]
    static_inputs: bool = False
    unpack_j: Constant | None = None


@dataclass(frozen=True, slots=True)
class EngineTarget:
    """What an NVIDIA device's engines are built with and for.

    TensorRT builds on the device alone; TensorRT-RTX builds ahead of time, anywhere, for desktop cards. `proxy` is the
    architecture that TensorRT-RTX compiles in place of the device's own: that one, or the nearest below that it knows.
    """

    compiler: str  # a key of ENGINE_COMPILERS
    compute_capability: int  # 87 is SM 8.7
    proxy: int
    mark: str
    source: str


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Everything eopc knows about a device; `dialects` is in order of preference.

    `threads` is the number of CPU threads the constants assume, None where the device is a GPU.
    `energy_source` is the source of joules computed from this profile: prior, or proxy (time x assumed
    watts).
    """

    name: str
    aliases: tuple[str, ...]
    description: str
    dialects: tuple[str, ...]
    compute_dtype: str
    energy_source: str
    threads: int | None
    notes: tuple[str, ...]
    prior_error: PriorError | None  # None: never compared with measurements on this device
    based_on: str | None
    precisions: Mapping[str, Precision]
    constants: Mapping[str, Constant] = field(repr=False)
    rails: RailRule | None = None  # None: the device has no rails of its own to read
    engine: EngineTarget | None = None  # None: no NVIDIA device, it runs ONNX

    def constant(self, name: str) -> float:
        """Return a constant in the unit of `CONSTANT_UNITS`."""
        return self.constants[name].value

    def precision(self, name: str, dialect: str | None = None) -> Precision:
        """Return an allowed precision; DeviceError names what is allowed (in that dialect)."""
        allowed = self.precisions_for(dialect)
        if name in allowed:
            return self.precisions[name]
        if name in self.precisions:
            raise DeviceError(
                f"{self.name} runs {name} only in the {' or '.join(self.precisions[name].dialects)} "
                f"dialect, not in {dialect}. Choose {', '.join(allowed)}, or another dialect."
            )
        near = did_you_mean(name, allowed)
        raise DeviceError(f'{self.name} does not run "{name}". Choose {", ".join(allowed)}.{near}')

    def precisions_for(self, dialect: str | None = None) -> tuple[str, ...]:
        """Return the precisions a dialect carries (all without one), in order of preference."""
        return tuple(p for p, entry in self.precisions.items() if dialect is None or dialect in entry.dialects)


def load_profile(name: str) -> DeviceProfile:
    """Return the profile of this name or alias (case and _ are ignored); DeviceError names the nearest."""
    wanted = name.strip().lower().replace("_", "-")
    profiles = list_profiles()
    for profile in profiles:
        if wanted in (profile.name, *profile.aliases):
            return profile
    names = [p.name for p in profiles]
    near = did_you_mean(wanted, [*names, *(a for p in profiles for a in p.aliases)])
    raise DeviceError(f'eopc has no device "{name}".{near} It knows {", ".join(names)}.')


@cache
def list_profiles() -> tuple[DeviceProfile, ...]:
    """Return all profiles shipped with eopc, by name."""
    texts = {
        entry.name.removesuffix(".json"): entry.read_text(encoding="utf-8")
        for entry in files("eopc_runtime").joinpath("_profiles").iterdir()
        if entry.name.endswith(".json")
    }
    return tuple(parse_profile(texts[name], name, texts) for name in sorted(texts))


def parse_profile(text: str, name: str, others: Mapping[str, str]) -> DeviceProfile:
    """Read one profile from JSON text; `others` holds the texts a `based_on` may refer to."""
    where = f"device profile {name}.json"
    fields = Fields(parse_json(text, where, DeviceError), where, DeviceError)
    if (schema := fields.integer("schema")) != 1:
        fields.fail(f"schema {schema} is not known; this eopc reads schema 1. Upgrade eopc.")
    if fields.text("name") != name:
        fields.fail(f'"name" must be "{name}", the name of the file.')
    parent = _parent(fields, others)
    dialects = fields.texts("dialects")
    if not dialects or set(dialects) - set(DIALECTS):
        fields.fail(f'"dialects" must name some of {", ".join(DIALECTS)}.')
    constants = dict(parent.constants) if parent else {}
    constants |= {key: _constant(entry, key) for key, entry in fields.children_by_name("constants").items()}
    for key in CONSTANT_UNITS.keys() - constants.keys():
        fields.fail(f'the constant "{key}" [{CONSTANT_UNITS[key]}] is missing.')
    own = {key: _precision(entry, key, dialects) for key, entry in fields.children_by_name("precisions").items()}
    precisions = own or (_carried(parent.precisions, dialects) if parent else {})
    if not precisions:
        fields.fail('"precisions" is empty; name at least one.')
    profile = DeviceProfile(
        name=name,
        aliases=fields.texts("aliases"),
        description=fields.text("description"),
        dialects=dialects,
        compute_dtype=fields.text("compute_dtype", choices=COMPUTE_DTYPES),
        energy_source=fields.text("energy_source", choices=("prior", "proxy")),
        threads=fields.integer_or_none("threads", minimum=1),
        notes=fields.texts("notes"),
        prior_error=PriorError.from_fields(fields.child("prior_error")) if "prior_error" in fields else None,
        based_on=parent.name if parent else None,
        precisions=MappingProxyType(precisions),
        constants=MappingProxyType(constants),
        rails=_rails(fields, name, parent),
        engine=_engine(fields, parent),
    )
    fields.done()
    return profile


def _rails(fields: Fields, name: str, parent: DeviceProfile | None) -> RailRule | None:
    """The profile's own rails, else those of the profile it is based on; null says that it has none."""
    if "rails" not in fields:
        return inherited(parent.rails, name) if parent and parent.rails else None
    return None if fields.raw("rails") is None else read_rails(fields.child("rails"), name)


def _engine(fields: Fields, parent: DeviceProfile | None) -> EngineTarget | None:
    """The profile's own engine target, else that of the profile it is based on."""
    if "engine" not in fields:
        return parent.engine if parent else None
    entry = fields.child("engine")
    capability = entry.integer("compute_capability", minimum=10)
    target = EngineTarget(
        compiler=entry.text("compiler", choices=ENGINE_COMPILERS),
        compute_capability=capability,
        proxy=entry.integer("proxy", minimum=10) if "proxy" in entry else capability,
        mark=entry.text("mark", choices=MARKS),
        source=entry.text("source"),
    )
    entry.done()
    return target


def _parent(fields: Fields, others: Mapping[str, str]) -> DeviceProfile | None:
    """The profile this one is based on, with every constant marked as unconfirmed here."""
    name = fields.text_or_none("based_on")
    if name is None:
        return None
    rest = {key: text for key, text in others.items() if key != name}  # a circle runs out of profiles
    if name not in others:
        fields.fail(f'"based_on" names "{name}", which is not there.{did_you_mean(name, others)}')
    parent = parse_profile(others[name], name, rest)

    def inherited(constant: Constant) -> Constant:
        return replace(constant, mark="u", source=f"taken from {name}, unconfirmed here: {constant.source}")

    return replace(
        parent,
        constants={key: inherited(c) for key, c in parent.constants.items()},
        precisions={
            key: replace(
                p,
                decode_efficiency=inherited(p.decode_efficiency),
                unpack_j=inherited(p.unpack_j) if p.unpack_j else None,
            )
            for key, p in parent.precisions.items()
        },
    )


def _carried(precisions: Mapping[str, Precision], dialects: tuple[str, ...]) -> dict[str, Precision]:
    """The precisions of another device that these dialects carry."""
    shared = {key: tuple(d for d in dialects if d in p.dialects) for key, p in precisions.items()}
    return {key: replace(p, dialects=shared[key]) for key, p in precisions.items() if shared[key]}


def _precision(fields: Fields, name: str, dialects: tuple[str, ...]) -> Precision:
    if name not in PRECISIONS:
        fields.fail(f"unknown precision; eopc has {', '.join(PRECISIONS)}.{did_you_mean(name, PRECISIONS)}")
    own = fields.texts("dialects", default=dialects)
    if not own or set(own) - set(dialects):
        fields.fail(f"its dialects must be some of the device's, {', '.join(dialects)}.")
    precision = Precision(
        decode_efficiency=_read_constant(fields.child("decode_efficiency"), "share"),
        dialects=own,
        static_inputs=fields.boolean("static_inputs", default=False),
        unpack_j=_read_constant(fields.child("unpack_j"), "J/weight") if "unpack_j" in fields else None,
    )
    fields.done()
    return precision


def _constant(fields: Fields, name: str) -> Constant:
    if name not in CONSTANT_UNITS:
        fields.fail(f"unknown constant.{did_you_mean(name, CONSTANT_UNITS)}")
    return _read_constant(fields, CONSTANT_UNITS[name], may_be_zero=name in _MAY_BE_ZERO)


def _read_constant(fields: Fields, unit: str, may_be_zero: bool = False) -> Constant:
    value = fields.number("value", minimum=0)
    if value == 0 and not may_be_zero:
        fields.fail('"value" must be more than 0.')
    if unit == "share" and value > 1:
        fields.fail(f'"value" is {value}, but a share lies between 0 and 1.')
    constant = Constant(
        value=value,
        unit=fields.text("unit", choices=[unit]),
        mark=fields.text("mark", choices=MARKS),
        source=fields.text("source"),
    )
    if not constant.source.strip():
        fields.fail('"source" is empty; say where the value comes from.')
    fields.done()
    return constant
