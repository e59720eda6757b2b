from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from ray_sampler.reporting import charts
from ray_sampler.reporting.report import format_bytes, format_percent, look_up, render_report

from .conftest import HOSTILE

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Tags with their attributes, and the text of every element that names its key."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[tuple[str, str | None, str]] = []
        self._open: tuple[str, str, str | None] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if (key := attributes.get("data-key")) is not None:
            self._open = (tag, key, attributes.get("value"))
            self._text = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[0] == tag:
            self.figures.append((self._open[1], self._open[2], self._text))
            self._open = None


def test_every_figure_on_the_page_is_that_of_the_summary(summary: dict[str, Any]) -> None:
    page = Page(render_report(summary, PNG, {0: PNG}))
    keys = set()
    for key, value, text in page.figures:
        keys.add(key)
        if value is None:
            continue  # a text: see below
        expected = look_up(summary, key)
        assert float(value) == expected, key
        plain = text.strip().replace(",", "")
        if plain.replace(".", "", 1).isdigit():
            assert float(plain) == pytest.approx(expected, rel=1e-3), key
    assert keys >= {"num_samples", "reused", "computed", "samples_per_second", "max_actors", "failures", "retries"}
    assert keys >= {f"seconds.{stage}" for stage in ("start", "sampling", "merge", "computing")}
    assert keys >= {"archive.bytes", "archive.members.0.crc32"}
    assert keys >= {f"labels.{label}" for label in range(10)}
    assert keys >= {f"pixels.{name}_fraction" for name in ("constant", "saturated", "duplicate")}
    assert keys >= {f"pixels.{name}.{channel}" for name in ("mean", "std") for channel in range(3)}
    assert keys >= {"computed_by.0.samples", "computed_by.1.samples", "fingerprint", "identity.seed", "settings.seed"}
    texts = {key: text for key, value, text in page.figures if value is None}
    assert texts["fingerprint"] == summary["fingerprint"]
    assert texts["archive.name"] == summary["archive"]["name"]
    assert texts["identity.seed"] == str(summary["identity"]["seed"])


def test_the_page_needs_no_network_and_no_javascript(summary: dict[str, Any]) -> None:
    page = Page(render_report(summary, PNG, {0: PNG}))
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{name} is a script"
            if name in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
                assert (value or "").startswith("data:")
    policies = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_css_fetches_nothing(summary: dict[str, Any]) -> None:
    html = render_report(summary, PNG)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "&#" not in style  # escaped quotes would break it


def test_a_name_from_outside_cannot_inject_markup(summary: dict[str, Any]) -> None:
    assert HOSTILE in summary["settings"]["model"]
    summary["rejected"].append({"name": "<img src=x onerror=alert(1)>", "reason": HOSTILE})
    html = render_report(summary, PNG)
    assert "<script" not in html
    assert "<img src=x" not in html


def test_suspicious_output_and_mixed_hardware_are_said_at_the_top(summary: dict[str, Any]) -> None:
    html = render_report(summary, PNG)
    top = html[: html.index("Contact sheet")]
    assert summary["pixels"]["warnings"]
    assert all(warning in top for warning in summary["pixels"]["warnings"])
    assert "Mixed hardware" in top
    quiet = summary | {"mixed_numerics": False, "pixels": summary["pixels"] | {"warnings": []}}
    html = render_report(quiet, PNG)
    assert "Look at these images" not in html
    assert "Mixed hardware" not in html


def test_a_run_without_labels_pixels_timeline_or_archive_has_a_report(summary: dict[str, Any]) -> None:
    empty: dict[str, list[float]] = {"elapsed_s": [], "samples_per_second": [], "actors": []}
    bare = summary | {"labels": None, "pixels": None, "timeline": empty, "computed_by": [], "mixed_numerics": False}
    bare |= {"archive": {"name": "", "bytes": 0, "members": []}, "seconds": {"start": 0, "sampling": 0, "merge": 0}}
    assert "50,000" in render_report(bare, PNG)


def test_a_report_says_how_to_repeat_the_run_and_which_classes_occur(summary: dict[str, Any]) -> None:
    summary["settings"]["num_classes"] = 1000
    html = render_report(summary, PNG)
    texts = {key: text for key, value, text in Page(html).figures if value is None}
    for name in ("command", "folder", "output", "date", "commit", "versions.torch"):
        assert texts[f"made.{name}"] == look_up(summary, f"made.{name}")
    assert "10 of 1,000 classes occur" in html


def test_a_thousand_labels_are_a_chart_and_a_table(summary: dict[str, Any]) -> None:
    summary["labels"] = {str(label): 40 + label % 17 for label in range(1000)}
    page = Page(render_report(summary, PNG))
    assert {key for key, _, _ in page.figures} >= {f"labels.{label}" for label in range(1000)}


@pytest.mark.parametrize("largest", [0.0, 0.003, 1.0, 7.0, 12.46, 99.0, 1001.0, 123_456.0])
def test_axes_end_at_round_numbers_just_above_the_data(largest: float) -> None:
    ticks = charts.ticks_up_to(largest)
    assert ticks[0] == 0
    assert largest <= ticks[-1] <= max(1.5 * largest, 1)
    assert 2 <= len(ticks) <= 6
    assert np.allclose(np.diff(ticks), ticks[1])
    assert charts.ticks_up_to(3.0, whole=True) == [0, 1, 2, 3]


def test_sizes_and_shares_read_well() -> None:
    assert [format_bytes(n) for n in (0, 999, 154_000_516, 10**13)] == ["0 bytes", "999 bytes", "154.0 MB", "10.0 TB"]
    assert [format_percent(share) for share in (0, 0.0002, 0.125, 1)] == ["0%", "0.02%", "12.5%", "100%"]
