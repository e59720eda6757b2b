"""The report in a real browser: headless Chromium, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_sampler.reporting.preview import class_rows, contact_sheet
from ray_sampler.reporting.report import look_up, render_report
from tests.cluster.processes import PATIENCE_S

from .test_report import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]

REPORTER = """
<script>
  // What only a browser knows, written into the page that --dump-dom prints.
  const frame = document.querySelector("iframe");
  frame.addEventListener("load", () => {
    const page = frame.contentDocument, view = frame.contentWindow;
    const result = {
      requests: view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
      broken: [...page.images].filter(i => !i.naturalWidth).length,
      images: page.images.length,
      overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
      background: view.getComputedStyle(page.body).backgroundColor,
      ticks: Math.max(...[...page.querySelectorAll(".plot")].map(plot => {
        const middle = element => { const box = element.getBoundingClientRect(); return box.left + box.width / 2; };
        return Math.abs(middle(plot.querySelector(".x span:nth-child(2)")) - middle(plot.querySelector("svg")));
      })),
    };
    for (const [key, value] of Object.entries(result)) document.body.setAttribute("data-" + key, value);
  });
</script>
"""


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """The document as the browser ends up with it, and what it logged. Every host name fails to resolve."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--allow-file-access-from-files",
        "--virtual-time-budget=4000", f"--user-data-dir={profile}", "--dump-dom", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    return done.stdout, done.stderr


@pytest.fixture
def report(tmp_path: Path, summary: dict[str, Any], images: np.ndarray) -> Path:
    labels = np.arange(len(images)) % 10
    sheet = contact_sheet(images, labels, "digits", "40 samples")
    path = tmp_path / "report.html"
    path.write_text(render_report(summary, sheet, class_rows(images, labels)))
    return path


def console_lines(log: str) -> list[str]:
    """What the page wrote to the console: errors, warnings and refusals alike."""
    return [line for line in log.splitlines() if "CONSOLE" in line]


def test_the_browser_shows_the_numbers_of_the_summary_and_reports_no_error(
    report: Path, tmp_path: Path, summary: dict[str, Any]
) -> None:
    dom, log = browse(report, tmp_path / "profile")
    assert console_lines(log) == []
    figures = [(key, value) for key, value, _ in Page(dom).figures if value is not None]
    assert len(figures) > 30
    for key, value in figures:
        assert float(value) == look_up(summary, key), key


def test_errors_on_the_console_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<script>console.error('broken')</script>")
    _, log = browse(page, tmp_path / "profile")
    assert len(console_lines(log)) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_asks_no_network_fits_a_phone_and_follows_the_colour_scheme(
    report: Path, tmp_path: Path, scheme: str
) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body><iframe src="report.html" style="width: 360px; height: 800px"></iframe>{REPORTER}</body>')
    dom, log = browse(
        frame, tmp_path / "profile", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    )
    body = next(attributes for tag, attributes in Page(dom).tags if tag == "body")
    assert console_lines(log) == []
    assert body["data-requests"] == ""
    assert (body["data-images"], body["data-broken"]) == ("11", "0")
    assert body["data-overflow"] == "0"
    assert float(str(body["data-ticks"])) < 1, "the middle tick of each axis is below its middle"
    assert body["data-background"] == {"light": "rgb(250, 249, 246)", "dark": "rgb(19, 21, 24)"}[scheme]
