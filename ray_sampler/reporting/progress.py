"""The display of a run: the driver pushes its state, a reporter draws it."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Literal, Protocol, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ray_sampler.errors import printable
from ray_sampler.process import Sturdy
from ray_sampler.reporting.options import Mode

Level = Literal["info", "warning", "error"]

LOG_INTERVAL_S = 10.0
"""Seconds between two lines of the log while nothing about the fleet changes."""

RATE_WINDOW_S = 30.0
"""Seconds that the present rate looks back, at least."""

RATE_WINDOW_SHARDS = 8
"""Shards that the present rate looks back, at least, so that slow shards do not make it flicker."""

AFTER_SAMPLING = ("merging", "done")
"""Stages that have no present rate."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run at one moment."""

    num_samples: int
    """Samples of the whole run."""
    reused: int = 0
    """Samples that earlier runs left."""
    done: int = 0
    """Samples finished by this run."""
    shards_in_flight: int = 0
    actors_ready: int = 0
    actors_starting: int = 0
    """Actors that have their resources and load the model."""
    actors_pending: int = 0
    """Actors that wait for a machine."""
    failures: int = 0
    """Shards and actors that failed so far."""
    stage: str = "starting"
    """What the run does now: starting, waiting for capacity, sampling, merging, done."""
    elapsed_s: float = 0.0
    """Seconds since the first shard was dispatched; 0 before."""
    rate_now: float = 0.0
    """Samples a second, lately."""
    rate: float = 0.0
    """Samples a second since the first shard was dispatched."""

    @property
    def finished(self) -> int:
        """Samples that exist, whoever made them."""
        return self.reused + self.done

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last sample at the present rate; 0 when all exist, None while nothing is known."""
        remaining = max(self.num_samples - self.finished, 0)
        if remaining == 0:
            return 0.0
        rate = self.rate_now or self.rate
        return remaining / rate if rate > 0 else None

    @property
    def fleet(self) -> tuple[str, int, int, int, int]:
        """What makes a line of the log worth writing at once when it changes."""
        return self.stage, self.actors_ready, self.actors_starting, self.actors_pending, self.failures


class Rates:
    """Samples a second from what finished when.

    The clock starts with the first shard, so neither start-up nor samples of earlier runs count. All times are
    seconds of one monotonic clock.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[float, int]] = deque()
        self._started: float | None = None
        self._done = 0

    def start(self, now: float) -> None:
        """The first shard was dispatched at `now`; later calls change nothing."""
        if self._started is None:
            self._started = now
            self._events.append((now, 0))

    def add(self, now: float, samples: int) -> None:
        """`samples` more were finished at `now`; starts the clock where `start` did not."""
        self.start(now)
        self._done += samples
        self._events.append((now, self._done))
        while len(self._events) > RATE_WINDOW_SHARDS + 1 and self._events[1][0] <= now - RATE_WINDOW_S:
            self._events.popleft()

    @property
    def done(self) -> int:
        """Samples finished so far."""
        return self._done

    def elapsed_s(self, now: float) -> float:
        """Seconds since the first shard was dispatched; 0 before."""
        return 0.0 if self._started is None else max(now - self._started, 0.0)

    def rate(self, now: float) -> float:
        """Samples a second since the first shard was dispatched; 0 before anything is finished."""
        elapsed = self.elapsed_s(now)
        return self._done / elapsed if elapsed > 0 else 0.0

    def rate_now(self, now: float) -> float:
        """Samples a second over the last 30 seconds, or over the last 8 shards where those took longer.

        It falls steadily when nothing is finished any more.
        """
        if self._done == 0:
            return 0.0
        since, before = self._events[0]
        for event in islice(self._events, 1, max(len(self._events) - RATE_WINDOW_SHARDS, 1)):
            if event[0] > now - RATE_WINDOW_S:
                break
            since, before = event
        return (self._done - before) / (now - since) if now > since else 0.0


class Reporter(Protocol):
    """Where a driver pushes its state, at least once a second and from one thread."""

    def update(self, snapshot: Snapshot) -> None:
        """Show the state of the run."""

    def message(self, text: str, level: Level = "info") -> None:
        """Say something that happened, in one line."""


@contextmanager
def reporter(
    mode: Mode = "auto",
    json_log: bool = False,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Reporter]:
    """A reporter that draws on `stream` and leaves the terminal as it found it.

    Where `stream` is closed, full or broken, the run continues without it. Messages have no control characters.

    Args:
        mode: bar (live, for a terminal), log (a line every 10 seconds and at every change of the fleet or stage),
            none (warnings and errors only), or auto: bar where `stream` is a terminal, log elsewhere.
        json_log: the log as one JSON object a line; takes the place of the bar too.
        stream: standard error, unless given.
        clock: seconds, for the log's interval.
    """
    stream = cast(TextIO, Sturdy(sys.stderr if stream is None else stream, raises=False))
    if mode == "auto":
        mode = "bar" if stream.isatty() else "log"
    if mode == "bar" and not json_log:
        bar = _Bar(Console(file=stream, force_terminal=True, legacy_windows=False))
        try:
            with bar.live, _warnings_to(bar):
                yield bar
        finally:
            bar.close()
    else:
        log = _Log(stream, json_log, mode == "none", clock)
        try:
            with _warnings_to(log):
                yield log
        finally:
            log.close()


class _Handler(logging.Handler):
    """Makes messages of log records."""

    def __init__(self, target: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.target = target

    def emit(self, record: logging.LogRecord) -> None:
        self.target.message(record.getMessage(), "warning")


@contextmanager
def _warnings_to(target: Reporter) -> Iterator[None]:
    """Show what this package logs, as the attempts at a store, with the time or above the bar."""
    handler, log = _Handler(target), logging.getLogger("ray_sampler")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class _Bar:
    """A live display of four lines at most."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.snapshot: Snapshot | None = None
        self.live = Live(get_renderable=self._draw, console=console, refresh_per_second=4, transient=True)

    def update(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def message(self, text: str, level: Level = "info") -> None:
        style = {"info": "", "warning": "yellow", "error": "bold red"}[level]
        text = printable(text, None)
        self.console.print(Text(text if level == "info" else f"{level}: {text}", style=style), soft_wrap=True)

    def close(self) -> None:
        """Leave the last state as one line above the prompt."""
        if self.snapshot is not None:
            self.console.print(Text(describe(self.snapshot)), soft_wrap=True)

    def _draw(self) -> Group | Text:
        return Text("") if self.snapshot is None else bar_lines(self.snapshot)


class _Log:
    """Lines on a stream, as text or as JSON."""

    def __init__(self, stream: TextIO, as_json: bool, quiet: bool, clock: Callable[[], float]) -> None:
        self.stream, self.as_json, self.quiet, self.clock = stream, as_json, quiet, clock
        self.snapshot: Snapshot | None = None
        self.written: Snapshot | None = None
        self.written_at = 0.0

    def update(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        changed = self.written is None or self.written.fleet != snapshot.fleet
        if changed or self.clock() - self.written_at >= LOG_INTERVAL_S:
            self._write_progress(snapshot)

    def message(self, text: str, level: Level = "info") -> None:
        if self.quiet and level == "info":
            return
        shown = text if level == "info" else f"{level}: {text}"
        self._write({"event": "message", "level": level, "text": text}, printable(shown, None))

    def close(self) -> None:
        """Write the last state unless it is there already."""
        if self.snapshot is not None and self.snapshot != self.written:
            self._write_progress(self.snapshot)

    def _write_progress(self, snapshot: Snapshot) -> None:
        self.written, self.written_at = snapshot, self.clock()
        if not self.quiet:
            self._write({"event": "progress", **asdict(snapshot), "eta_s": snapshot.eta_s}, describe(snapshot))

    def _write(self, event: dict[str, object], text: str) -> None:
        now = datetime.now(UTC)
        if self.as_json:
            line = json.dumps({"time": now.isoformat(timespec="milliseconds"), **event})
        else:
            line = f"{now.astimezone():%H:%M:%S} {text}"
        self.stream.write(line + "\n")
        self.stream.flush()


def describe(snapshot: Snapshot) -> str:
    """The state of a run in one line that needs no terminal."""
    amount, *more = amounts(snapshot)
    if snapshot.finished < snapshot.num_samples:
        more.append(f"ETA {format_seconds(snapshot.eta_s)}")
    parts = [f"{snapshot.stage}: {amount} ({whole_percent(snapshot)}%)", *more, *fleet_of(snapshot)]
    return " | ".join(parts)


def bar_lines(snapshot: Snapshot) -> Group:
    """The state of a run as three lines of a terminal, 80 columns wide or less."""
    first = Table.grid(padding=(0, 1), expand=False)
    first.add_row(
        Text(f"{snapshot.stage:<20}", style="bold cyan"),
        ProgressBar(total=max(snapshot.num_samples, 1), completed=snapshot.finished, width=24),
        Text(f"{whole_percent(snapshot):>3}%"),
        Text(f"ETA {format_seconds(snapshot.eta_s)}"),
    )
    lines = ("  ".join(parts) for parts in (amounts(snapshot), fleet_of(snapshot)))
    return Group(first, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


def amounts(snapshot: Snapshot) -> list[str]:
    """How many samples there are, and how fast they come."""
    parts = [f"{snapshot.finished:,} of {snapshot.num_samples:,} samples"]
    if snapshot.reused:
        parts.append(f"{snapshot.reused:,} reused")
    if snapshot.done:
        now = f"{format_rate(snapshot.rate_now)} now, " if snapshot.stage not in AFTER_SAMPLING else ""
        parts.append(f"{now}{format_rate(snapshot.rate)} overall")
    return parts


def fleet_of(snapshot: Snapshot) -> list[str]:
    """Actors, what they do, and what failed."""
    waiting = ((snapshot.actors_starting, "starting"), (snapshot.actors_pending, "pending"))
    actors = [f"{snapshot.actors_ready} ready", *(f"{number} {name}" for number, name in waiting if number)]
    counts = ((snapshot.shards_in_flight, "shard", " in flight"), (snapshot.failures, "failure", ""))
    return [f"actors {', '.join(actors)}", *(count(number, noun) + more for number, noun, more in counts if number)]


def whole_percent(snapshot: Snapshot) -> int:
    """Percent of the samples that exist, rounded down: 100 only when nothing is missing."""
    return 100 * snapshot.finished // max(snapshot.num_samples, 1)


def count(number: float, noun: str) -> str:
    """A number with its noun: 1 shard, 2,000 shards, 0.5 GPUs."""
    shown = int(number) if number == int(number) else round(number, 3)
    return f"{shown:,} {noun}{'' if number == 1 else 's'}"


def format_rate(rate: float) -> str:
    """Samples a second with three significant digits: 0.0123/s, 45.6/s, 12,345/s."""
    if rate >= 100:
        return f"{rate:,.0f}/s"
    return f"{rate:.1f}/s" if rate >= 10 else f"{rate:.2f}/s" if rate >= 0.1 or rate == 0 else f"{rate:.3g}/s"


def format_seconds(seconds: float | None) -> str:
    """A duration for people: 12 s, 3 min 20 s, 2 h 05 min, 3 d 04 h; a dash for None."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
