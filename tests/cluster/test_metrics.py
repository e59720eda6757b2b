"""What is counted, and what the dashboard draws of it; test_job_submit.py scrapes a real endpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from ray.util.metrics import Metric

from ray_sampler.cluster.metrics import ActorMetrics, DriverMetrics

DASHBOARD = Path(__file__).parent.parent.parent / "deploy" / "grafana-dashboard.json"


@pytest.mark.usefixtures("local_ray")
def test_the_dashboard_draws_every_metric_that_is_exported_and_no_other() -> None:
    exported = {
        f"ray_{metric.info['name']}"
        for owner in (ActorMetrics("a run"), DriverMetrics("a run"))
        for metric in (*vars(owner).values(), *getattr(owner, "counters", ()))
        if isinstance(metric, Metric)
    }
    assert len(exported) == 7
    panels = json.loads(DASHBOARD.read_text())["panels"]
    drawn = {name for panel in panels for target in panel["targets"] for name in re.findall(r"ray_\w+", target["expr"])}
    assert drawn == exported
