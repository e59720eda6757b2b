"""What real runs show: lines that need no terminal, and a report whose numbers are those of summary.json."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ray_sampler.cli import main
from ray_sampler.reporting.report import look_up
from tests.cluster.runs import flags_of

pytestmark = pytest.mark.usefixtures("local_ray")


def test_the_log_has_a_line_for_each_change_of_the_fleet(configure, capsys):
    assert main(["sample", *flags_of(configure(progress="log", num_heads=4))]) == 0
    *lines, archive, report, preview = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in (*lines, archive, report, preview))
    assert archive.endswith(".npz")
    assert (report.rpartition("/")[2], preview.rpartition("/")[2]) == ("report.html", "preview.png")
    assert re.search(r" run [0-9a-f]{8} in ", lines[0])
    states = [line[9:].split(" | ") for line in lines[1:]]
    stages = list(dict.fromkeys(parts[0].partition(":")[0] for parts in states))
    assert stages[-3:] == ["sampling", "merging", "done"]
    assert set(stages[:-3]) <= {"waiting for capacity", "starting"}
    shown = [
        (parts[0].partition(":")[0], next(part for part in parts if part.startswith("actors"))) for parts in states
    ]
    assert shown[0][1] in ("actors 0 ready, 1 pending", "actors 0 ready, 1 starting", "actors 1 ready")
    assert ("sampling", "actors 1 ready") in shown
    assert shown[-2:] == [("merging", "actors 0 ready"), ("done", "actors 0 ready")]
    assert states[-1][0] == "done: 40 of 40 samples (100%)"


def test_lines_after_sampling_show_neither_actors_nor_a_present_rate(configure, capsys):
    assert main(["sample", *flags_of(configure(progress="log", num_heads=4))]) == 0
    after = [line for line in capsys.readouterr().err.splitlines() if re.search(r" (merging|done): ", line)]
    assert len(after) >= 2  # and one every ten seconds
    for line in after:
        assert "| actors 0 ready" in line
        assert "starting" not in line
        assert "pending" not in line
        assert "in flight" not in line
        assert " now" not in line
        assert re.search(r"\| [\d.,]+/s overall \|", line)


def test_every_line_of_the_json_log_is_json(configure, capsys):
    assert main(["sample", *flags_of(configure(json_log=True))]) == 0
    printed = capsys.readouterr()
    events = [json.loads(line) for line in printed.err.splitlines()]
    assert {event["event"] for event in events} == {"message", "progress"}
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["stage"], last["num_samples"], last["done"], last["reused"], last["eta_s"]) == ("done", 40, 40, 0, 0.0)
    assert next(event["done"] for event in events if event["event"] == "progress") == 0
    assert printed.out.strip().endswith(".npz")


def test_the_report_of_a_real_run_shows_the_numbers_of_its_summary(finished: Path):
    from tests.reporting.test_report import Page

    summary = json.loads((finished / "summary.json").read_text())
    figures = Page((finished / "report.html").read_text()).figures
    shown = {key for key, value, _ in figures if value is not None}
    assert {"num_samples", "computed", "reused", "samples_per_second", "seconds.sampling", "archive.bytes"} <= shown
    assert {f"labels.{label}" for label in summary["labels"]} <= shown
    for key, value, text in figures:
        expected = look_up(summary, key)
        if value is not None:
            assert float(value) == expected, key
        elif key in ("fingerprint", "archive.name"):
            assert text.strip() == expected


@pytest.mark.slow
def test_a_browser_shows_the_report_of_a_real_run(finished: Path, tmp_path: Path):
    from tests.reporting.test_report import Page
    from tests.reporting.test_report_browser import CHROMIUM, browse, console_lines

    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    shutil.copy(finished / "report.html", tmp_path / "report.html")
    dom, log = browse(tmp_path / "report.html", tmp_path / "profile")
    assert console_lines(log) == []
    summary = json.loads((finished / "summary.json").read_text())
    figures = [(key, value) for key, value, _ in Page(dom).figures if value is not None]
    assert len(figures) > 25
    for key, value in figures:
        assert float(value) == look_up(summary, key), key
