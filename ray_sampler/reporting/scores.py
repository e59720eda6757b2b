"""What is said and kept of a score: a line, scores.json, and a place in summary.json and report.html."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import escape

from ray_sampler.storage.run_dir import REPORT, SCORES, SUMMARY, RunDir

CUSTOMARY = 50_000
"""Samples of which an FID is called FID-50k."""


def named(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics with their values, as people read them."""
    metrics = scores["metrics"]
    fid = "FID-50k" if scores["num_samples"] == CUSTOMARY else "FID"
    shown = []
    names = {"fid": fid, "sfid": "sFID", "is": "IS", "kid": "KID", "precision": "precision", "recall": "recall"}
    for key, name in names.items():
        if key in metrics:
            value = metrics[key]
            mean, *deviation = value if isinstance(value, list) else (value,)
            shown.append((name, f"{mean:.4g}" + "".join(f" ± {spread:.2g}" for spread in deviation)))
    return shown


def details(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the metrics are of, in phrases."""
    features, reference = scores["features"], scores["reference"]
    unchecked = "" if reference.get("checked") else ", which does not say which features it is of"
    return [
        ("samples", f"{scores['num_samples']:,}"),
        ("features", f"{features['name']} {features['sha256'][:8]}"),
        ("resize", scores["resize"]),
        ("reference", f"{reference['name']} {reference['sha256'][:8]}{unchecked}"),
    ]


def described(scores: Mapping[str, Any]) -> str:
    """A score in one line."""
    values = ", ".join(f"{name} {value}" for name, value in named(scores))
    of = dict(details(scores))
    return (
        f"{values} of {of['samples']} samples against {of['reference']} (features {of['features']}, resize "
        f"{of['resize']})"
    )


def write_scores(run_dir: RunDir, scores: Mapping[str, Any], name: str = SCORES) -> None:
    run_dir.write_file(name, json.dumps(scores, indent=1).encode() + b"\n")


def read_scores(run_dir: RunDir) -> dict[str, Any] | None:
    """The content of scores.json; None where there is none, or none of ours."""
    try:
        scores: Any = json.loads(run_dir.read_file(SCORES) or "null")
        described(scores)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(scores)


def show_in_run(run_dir: RunDir, scores: Mapping[str, Any]) -> None:
    """Put a score into the summary and the report of a finished run, if they are of as many samples."""
    text, page = run_dir.read_file(SUMMARY), run_dir.read_file(REPORT)
    summary = json.loads(text or "{}")
    if summary.get("num_samples") != scores["num_samples"]:
        return
    run_dir.write_file(SUMMARY, json.dumps(summary | {"scores": scores}, indent=1).encode())
    if page:
        run_dir.write_view(REPORT, with_section(page.decode(), scores).encode())


SECTION = re.compile(r"<section id=\"scores\">.*?</section>\n", re.DOTALL)


def with_section(page: str, scores: Mapping[str, Any]) -> str:
    """A report with a section on the scores after its first figures."""
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in named(scores))
    of = "; ".join(f"{escape(name)} {escape(value)}" for name, value in details(scores))
    section = '<section id="scores">\n<h2>Scores</h2>\n'
    section += f'<dl class="cards">{cards}</dl>\n<p class="note">{of}.</p>\n</section>\n'
    before, cards_end, after = SECTION.sub("", page).partition("</dl>\n")
    return f"{before}{cards_end}{section}{after}"
