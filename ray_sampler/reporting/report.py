"""report.html: a run at a glance, as one file that needs no network and no JavaScript."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ray_sampler.reporting import charts
from ray_sampler.reporting.progress import format_seconds

FEW_CLASSES = 24
"""Classes up to which what is shown of each is shown at once."""
SHOWN = 6
"""Ranges of one numerics key, and rejected fragments, that are listed."""

CHANNELS = {1: ("grey",), 3: ("red", "green", "blue")}
"""Names of the channels of pictures."""


def render_report(
    summary: Mapping[str, Any], contact_sheet_png: bytes, per_class: Mapping[int, bytes] | None = None
) -> str:
    """One HTML document about a run.

    Every figure of the summary is in an element `<data data-key="..." value="...">`, whose key is the path in
    summary.json and whose value is the number there.

    Args:
        summary: the content of summary.json.
        contact_sheet_png: the bytes of preview.png.
        per_class: a picture for each label, as `class_rows` makes them; None for an unconditional model.
    """
    environment = Environment(
        loader=PackageLoader("ray_sampler.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "bytes": format_bytes,
        "percent": format_percent,
        "duration": format_seconds,
        "data_url": _data_url,
        "setting": format_setting,
    }
    timeline = summary["timeline"]
    return environment.get_template("report.html.j2").render(
        s=summary,
        name=model_name(summary),
        look=lambda key: look_up(summary, key),
        contact_sheet=contact_sheet_png,
        per_class=dict(per_class or {}),
        throughput=charts.over_time(timeline["elapsed_s"], timeline["samples_per_second"], "samples a second"),
        fleet=charts.over_time(timeline["elapsed_s"], timeline["actors"], "actors ready", steps=True),
        channels=CHANNELS[len(summary["pixels"]["mean"])] if summary["pixels"] else (),
        few_classes=FEW_CLASSES,
        shown=SHOWN,
        width=charts.PLOT_WIDTH,
        height=charts.PLOT_HEIGHT,
    )


def look_up(summary: Mapping[str, Any], key: str) -> Any:
    """The value at a path such as seconds.sampling or pixels.mean.0.

    Raises:
        KeyError: there is none.
    """
    value: Any = summary
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, Sequence) and not isinstance(value, str) else value[part]
    return value


def model_name(summary: Mapping[str, Any]) -> str:
    """The model's name, or the file name of its checkpoint."""
    return str(summary["settings"].get("model") or "model").rstrip("/").rsplit("/", 1)[-1]


def figure(number: float) -> str:
    """A number for people: whole ones with thousands separators, others with four significant digits."""
    if isinstance(number, int) or abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.4g}"


def format_bytes(number: int) -> str:
    """A size for people: 614.4 MB."""
    size = float(number)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def format_percent(share: float) -> str:
    """A share for people: 0%, 0.02%, 12.5%."""
    return f"{100 * share:.3g}%"


def format_setting(value: object) -> str:
    """A setting as one would type it; a dash for what was left open."""
    if value is None or value == "":
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
