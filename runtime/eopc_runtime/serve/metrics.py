"""What Prometheus reads at /metrics; every joule carries the phase it was booked in and the source of its price."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_JOULES = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_JOULES_PER_TOKEN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        self.requests = counter("eopc_requests_total", "HTTP requests answered.", "route", "status")
        self.energy = counter("eopc_energy_joules_total", "Joules booked by sequences.", "phase", "source")
        self.tokens = counter("eopc_tokens_total", "Tokens read and written.", "kind")
        self.tier_tokens = counter("eopc_tier_tokens_total", "Tokens written, by the tier that computed them.", "tier")
        self.sequences = counter("eopc_sequences_total", "Sequences that ended, and by what.", "ended_by")
        self.budget_stops = counter("eopc_budget_stops_total", "Sequences that their budget ended.")
        self.refusals = counter("eopc_refusals_total", "Requests that were refused, and why.", "reason")
        self.per_sequence = histogram("eopc_sequence_joules", "Joules of a sequence.", _JOULES)
        self.per_token = histogram("eopc_joules_per_token", "Joules of a sequence per new token.", _JOULES_PER_TOKEN)

        self.allowances = Gauge(
            "eopc_allowance_remaining_joules", "Joules left of an allowance.", ("period",), registry=self.registry
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read when Prometheus asks."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
