from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from ray_sampler.reporting.progress import Rates, Snapshot, bar_lines, describe, format_seconds, reporter

LARGE = Snapshot(
    num_samples=10_000_000,
    reused=1_234_567,
    done=2_345_678,
    shards_in_flight=256,
    actors_ready=128,
    actors_starting=3,
    actors_pending=12,
    failures=13,
    stage="waiting for capacity",
    rate_now=1300.25,
    rate=1234.5,
    elapsed_s=1900.0,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_start_up_and_reused_samples_do_not_spoil_the_eta() -> None:
    rates = Rates()
    assert (rates.elapsed_s(500.0), rates.rate(500.0), rates.rate_now(500.0)) == (0, 0, 0)
    rates.start(1000.0)
    for shard in range(1, 11):
        rates.add(1000.0 + 5 * shard, 100)
    assert rates.elapsed_s(1050.0) == 50
    assert rates.rate(1050.0) == rates.rate_now(1050.0) == 20
    snapshot = Snapshot(num_samples=10_000, reused=7000, done=rates.done, rate_now=rates.rate_now(1050.0))
    assert snapshot.eta_s == (10_000 - 7000 - 1000) / 20


def test_the_present_rate_follows_the_fleet_and_the_overall_rate_remembers() -> None:
    rates = Rates()
    rates.start(0.0)
    for second in range(1, 101):
        rates.add(float(second), 10)
    for second in range(101, 161):
        rates.add(float(second), 40)
    assert rates.rate_now(160.0) == pytest.approx(40)
    assert rates.rate(160.0) == pytest.approx((1000 + 2400) / 160)


def test_slow_shards_do_not_make_the_present_rate_flicker() -> None:
    rates = Rates()
    rates.start(0.0)
    for minute in range(1, 21):
        rates.add(60.0 * minute, 60)
    for late in (0.0, 20.0, 59.0):
        assert rates.rate_now(1200.0 + late) == pytest.approx(1, rel=0.15)
    assert rates.rate_now(1200.0 + 36_000) < 0.02


def test_the_eta_is_unknown_before_the_first_sample_and_zero_after_the_last() -> None:
    assert Snapshot(num_samples=10).eta_s is None
    assert Snapshot(num_samples=10, reused=10).eta_s == 0


def test_a_line_every_10_seconds_and_at_every_change_of_the_fleet() -> None:
    now = 0.0
    stream = io.StringIO()
    with reporter("log", stream=stream, clock=lambda: now) as log:
        for second in range(25):
            now = 100.0 + second
            log.update(Snapshot(num_samples=100, done=second, actors_ready=2 if second < 13 else 1, stage="sampling"))
    finished = [int(line.split(": ")[1].split(" of ")[0]) for line in stream.getvalue().splitlines()]
    assert finished == [0, 10, 13, 23, 24]  # begin, 10 s, an actor lost, 10 s later, the end


def test_a_line_is_readable_without_a_terminal() -> None:
    line = describe(LARGE)
    assert "\x1b" not in line
    assert "\n" not in line
    for part in ("3,580,245 of 10,000,000", "(35%)", "1,234,567 reused", "1,300/s now", "1,234/s overall", "128 ready"):
        assert part in line
    assert "3 starting, 12 pending" in line
    assert "256 shards in flight" in line
    assert "13 failures" in line


def test_100_percent_is_shown_only_when_nothing_is_missing() -> None:
    assert "(99%)" in describe(Snapshot(num_samples=10_000, done=9_999))
    assert "(100%)" in describe(Snapshot(num_samples=10_000, done=10_000))


def test_the_json_log_is_one_object_a_line_with_every_field() -> None:
    stream = io.StringIO()
    with reporter("bar", json_log=True, stream=stream) as log:
        log.update(LARGE)
        log.message('a "quoted"\nthing', "warning")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["event"], first["done"]) == ("progress", LARGE.done)
    assert first["eta_s"] == pytest.approx(LARGE.eta_s)
    assert (second["event"], second["level"], second["text"]) == ("message", "warning", 'a "quoted"\nthing')


def test_none_says_nothing_but_warnings_and_errors() -> None:
    stream = io.StringIO()
    with reporter("none", stream=stream) as log:
        log.update(LARGE)
        log.message("all is well")
        log.message("a fragment was rejected", "warning")
    assert stream.getvalue().splitlines()[0].endswith("warning: a fragment was rejected")
    assert len(stream.getvalue().splitlines()) == 1


def test_auto_is_a_bar_on_a_terminal_and_a_log_elsewhere() -> None:
    for stream, live in ((Terminal(), True), (io.StringIO(), False)):
        with reporter("auto", stream=stream) as shown:
            shown.update(LARGE)
        assert ("\x1b[?25l" in stream.getvalue()) == live


def test_the_bar_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(bar_lines(LARGE))
    lines = capture.get().splitlines()
    assert len(lines) == 3
    assert all(len(line) <= 80 and "…" not in line for line in lines)
    for part in (
        "35%",
        "ETA",
        "3,580,245 of 10,000,000",
        "1,300/s now",
        "128 ready, 3 starting, 12 pending",
        "13 failures",
    ):
        assert part in capture.get()


def test_the_bar_cleans_up_after_itself_even_when_the_run_fails() -> None:
    stream = Terminal()

    def interrupted_run() -> None:
        with reporter("bar", stream=stream) as bar:
            bar.update(LARGE)
            bar.message("a node is gone", "warning")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_run()
    text = stream.getvalue()
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l") == 1  # the cursor is back
    assert "warning: a node is gone" in text
    assert text.rstrip().endswith("13 failures")  # where the run stood stays on the screen


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0, "0 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"), (93_600, "1 d 02 h")]
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text
