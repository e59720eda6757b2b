"""What is read of a run directory is shown as far as it was looked at, and never as a terminal's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_sampler import run_folder
from ray_sampler.cli import main
from ray_sampler.reporting.progress import reporter
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import DamagedFragment, FragmentFormat, FragmentName, fingerprint
from ray_sampler.storage.run_dir import RunDir
from tests.cluster.runs import flags_of, leave, part
from tests.conftest import Configure

ESCAPE = "A10G\x1b]0;title\x07\x1b[2J\u202e"
RANGES = [(start, start + 4) for start in range(0, 40, 4)]


def make(configure: Configure, samples, output: Path, format: FragmentFormat = "parquet", **made: str) -> None:
    """A run of ten fragments, of which only the sixth comes from another device."""
    config = configure(fragment_format=format)
    leave(config, samples, [])
    run = json.loads((output / "run.json").read_text())
    for start, stop in RANGES:
        by = {"device": "A10G", "numerics_key": "key"} | (made if start == 20 else {})
        data, _ = encode(part(samples, start, stop), run["fingerprint"], by, format)
        RunDir(str(output)).fragments.write(FragmentName(start, stop, format), data)


def test_status_looks_at_the_ends_of_all_fragments(configure: Configure, samples, tmp_path: Path, capsys):
    make(configure, samples, tmp_path / "run", device="H200", numerics_key="another")
    assert main(["status", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == {"A10G": 36, "H200": 4}
    assert (found["fragments"], found["records_read"]) == (10, 10)
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "looked at" not in capsys.readouterr().out


@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_status_says_of_how_many_it_speaks(configure: Configure, samples, tmp_path: Path, format, capsys, monkeypatch):
    make(configure, samples, tmp_path / "run", format)
    monkeypatch.setattr(run_folder, "RECORDS_READ", {"parquet": 3, "npz": 3})
    assert main(["status", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "A10G (12 samples), in 3 of 10 fragments that were looked at" in shown


def test_a_record_is_read_from_the_end_of_its_file_alone(configure: Configure, samples, tmp_path: Path):
    make(configure, samples, tmp_path / "run")
    run_dir, name = RunDir(str(tmp_path / "run")), FragmentName(0, 4, "parquet")
    path = tmp_path / "run" / "fragments" / name.filename
    whole = run_dir.fragments.read(name, None).record
    data = path.read_bytes()
    path.write_bytes(b"\0" * 100_000 + data[100:])  # what precedes the footer is not looked at
    assert run_dir.ranges().read_record(name, None) == whole
    for damaged in (b"", data[:-5], data[-1000:-4] + b"PARX", b"\0" * len(data)):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFragment):
            run_dir.ranges().read_record(name, None)
    path.write_bytes(data)
    with pytest.raises(DamagedFragment, match="another run"):
        run_dir.ranges().read_record(name, "ab" * 32)


@pytest.mark.parametrize("command", ["status", "verify", "merge", "preview"])
def test_no_command_passes_on_what_a_terminal_would_obey(configure, samples, tmp_path: Path, command, capsys):
    make(configure, samples, tmp_path / "run", device=ESCAPE, numerics_key=ESCAPE)
    (tmp_path / "run" / "fragments" / f"{ESCAPE}.txt").write_text("no fragment")
    main([command, str(tmp_path / "run")])
    said = capsys.readouterr()
    assert all(line.isprintable() for line in (said.out + said.err).splitlines()), said
    assert "A10G" in said.out or command in ("merge", "preview")


def test_a_refusal_quotes_run_json_without_its_escapes(configure: Configure, samples, tmp_path: Path, capsys):
    make(configure, samples, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    run: dict[str, Any] = json.loads(path.read_text())
    identity = run["identity"] | {"sampler": ESCAPE, ESCAPE: "1"}
    path.write_text(json.dumps(run | {"identity": identity, "fingerprint": fingerprint(identity)}))
    assert main(["sample", *flags_of(configure())]) == 2
    said = capsys.readouterr()
    assert "belongs to a run with other settings" in said.err
    assert all(line.isprintable() for line in (said.out + said.err).splitlines()), said


@pytest.mark.parametrize("mode", ["bar", "log"])
def test_a_reporter_shows_no_control_characters(mode, capsys):
    with reporter(mode) as report:
        report.message(f"rejected {ESCAPE}", "warning")
    said = capsys.readouterr().err
    assert "\x1b]0;" not in said
    assert "\x1b[2J" not in said
    assert "\\x1b]0;title" in said.replace("\n", "")
