"""Counters and gauges on Ray's Prometheus endpoint; deploy/grafana-dashboard.json draws them.

Ray puts `ray_` before each name.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

RUN = ("run",)

COUNTED = {
    "samples_total": "Samples whose fragments were written.",
    "shards_total": "Shards whose fragments were written.",
    "compute_seconds_total": "Seconds of computing.",
    "wait_seconds_total": "Seconds in which the device had nothing to do.",
    "upload_seconds_total": "Seconds of encoding and writing.",
}


class ActorMetrics:
    """What one actor counts. `run` is the start of the fingerprint."""

    def __init__(self, run: str) -> None:
        self.tags = {"run": run}
        self.counters = [Counter(f"ray_sampler_{name}", description, RUN) for name, description in COUNTED.items()]

    def count(self, samples: int, compute_s: float, wait_s: float, upload_s: float) -> None:
        """Count one finished shard."""
        for counter, value in zip(self.counters, (samples, 1, compute_s, wait_s, upload_s), strict=True):
            if value > 0:
                counter.inc(value, self.tags)


class DriverMetrics:
    """What the driver counts."""

    def __init__(self, run: str) -> None:
        self.retries = Counter("ray_sampler_retries_total", "Times that a shard was put back in the queue.", RUN)
        self.actors = Gauge("ray_sampler_actors", "Actors, by state.", ("run", "state"))
        self.retries.set_default_tags({"run": run})
        self.actors.set_default_tags({"run": run})

    def fleet(self, ready: int, starting: int, pending: int) -> None:
        """Note the size of the fleet."""
        for state, number in (("ready", ready), ("starting", starting), ("pending", pending)):
            self.actors.set(number, {"state": state})
