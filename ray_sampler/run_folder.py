"""What can be asked of, and done with, a run directory from any machine, without Ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ray_sampler.errors import RequestError, RunError, counted, printable
from ray_sampler.options import flags_of
from ray_sampler.presets import OBJECT
from ray_sampler.reporting.scores import read_scores
from ray_sampler.reporting.sheet import PREVIEW, Sheet
from ray_sampler.reporting.status import FragmentFact, Status, render, status
from ray_sampler.storage.archive import DamagedPiece, archive_complete, archive_intact, content_of, lay_out, merge
from ray_sampler.storage.ranges import cover, missing
from ray_sampler.storage.record import DamagedFragment, FragmentName, Record
from ray_sampler.storage.run_dir import RunDir

if TYPE_CHECKING:
    from ray_sampler.config import RunConfig

WATCH_S = 10.0

RECORDS_READ = {"parquet": 1000, "npz": 8}
"""Fragments whose records `status` reads, at most: of Parquet it reads the ends alone, of npz all."""

READS_AT_ONCE = 16

NEEDED = {"fingerprint", "num_samples", "image_shape", "labelled", "settings"}
"""What is read of run.json."""


def open_run(url: str) -> tuple[RunDir, dict[str, Any]]:
    """A run directory and its run.json.

    Raises:
        RequestError: there is no run.
    """
    run_dir = RunDir(url)
    run = run_dir.read_run()
    if run is None:
        raise RequestError(f"{run_dir.url} is not a run directory (no run.json); give the --output of a run")
    if not run.keys() >= NEEDED:
        raise RequestError(f"{run_dir.url}/run.json is not one of ray-sampler's; give the --output of a run")
    return run_dir, run


def resumed(url: str, beside: Mapping[str, Any]) -> RunConfig:
    """The request that began the run in a directory, which becomes its output, with other flags of its fleet.

    The working directory becomes the one of that command, where that exists here.

    Raises:
        RequestError: there is no run, or its command was not recorded.
    """
    from ray_sampler.config import RunConfig
    from ray_sampler.flags import value_of

    run_dir, run = open_run(url)
    flags = flags_of(RunConfig)
    try:
        _, *arguments = run["command"]["argv"]
        texts = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
        named = {name.replace("-", "_"): text for name, text in texts.items()}
        given = {name: value_of(flags[name], text) for name, text in named.items()}
        folder = str(run["command"]["folder"])
    except (KeyError, TypeError, ValueError) as error:
        name = str(run["settings"].get("model"))
        how = (
            f"call run() with the same Model, {name.removeprefix(OBJECT)}, and output={run_dir.url!r}"
            if name.startswith(OBJECT)
            else f"type it again, with the flags that it had: ray-sampler sample --model {printable(name)} "
            f"--num_samples {run['num_samples']} ... --output {run_dir.url}"
        )
        raise RequestError(f"{run_dir.url} does not record the command that began it; {how}") from error
    if os.path.isdir(folder):
        os.chdir(folder)
    return RunConfig(**(given | {"output": run_dir.url} | dict(beside)))


def print_status(url: str, as_json: bool, watch: bool) -> int:
    """Say how far the run is; with `watch` again and again until it is done."""
    run_dir, run = open_run(url)
    console = Console()
    while True:
        found = status_of(run_dir, run)
        if as_json:
            print(json.dumps(found.as_json()), flush=True)
        else:
            console.print(render(found))
        if not watch or found.state == "done":
            return 0
        time.sleep(WATCH_S)


def status_of(run_dir: RunDir, run: dict[str, Any]) -> Status:
    """How far a run is, from the listing of its fragments and the records of a few."""
    listing = run_dir.fragments.list(times=True)
    damaged = lost(run_dir, run["fingerprint"])
    fragments = [name for name in listing.fragments if name not in damaged]
    looked_at = [
        name
        for kind, most in RECORDS_READ.items()
        for name in evenly([name for name in fragments if name.format == kind], most)
    ]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        made = dict(
            zip(looked_at, pool.map(lambda name: made_by(run_dir, name, run["fingerprint"]), looked_at), strict=True)
        )
    facts = [
        FragmentFact(
            name,
            listing.modified.get(name),
            text_or_none(made.get(name, {}).get("device")),
            text_or_none(made.get(name, {}).get("numerics_key")),
        )
        for name in fragments
    ]
    archive = run_dir.archive_name(run["num_samples"], tuple(run["image_shape"]))
    there = run_dir.has(archive)
    damaged_archive = there and not archive_complete(run_dir, *shape_of(run))
    named = archive if there and not damaged_archive else None
    found = status(run["fingerprint"], run["num_samples"], facts, named, time.time())
    products = {
        folder: sum(
            stop - start for start, stop, _ in cover(run_dir.ranges(folder).list().fragments, run["num_samples"])
        )
        for folder in run_dir.products()
    }
    return replace(found, products=products, scores=read_scores(run_dir), archive_damaged=damaged_archive)


def shape_of(run: Mapping[str, Any]) -> tuple[int, tuple[int, int, int], bool, str]:
    """Of the archive of a run: samples, (H, W, C), whether it has labels, and the dtype of its images."""
    height, width, channels = run["image_shape"]
    dtype = "float32" if run["settings"].get("decoder") == "none" else "uint8"
    return run["num_samples"], (height, width, channels), run["labelled"], dtype


def lost(run_dir: RunDir, fingerprint: str) -> set[FragmentName]:
    """Fragments that a run found damaged and could not move, and that were not replaced by valid ones since."""
    ranges, damaged = run_dir.ranges(), set()
    for name in ranges.noted():
        try:
            ranges.read(name, fingerprint)
        except DamagedFragment:
            damaged.add(name)
    return damaged


def evenly(names: Sequence[FragmentName], most: int) -> Sequence[FragmentName]:
    """All of `names`, or this number of them at even distances."""
    return [names[i * len(names) // most] for i in range(most)] if len(names) > most else names


def text_or_none(value: object) -> str | None:
    """What a record says, which may be anything."""
    return None if value is None else str(value)


def made_by(run_dir: RunDir, name: FragmentName, fingerprint: str) -> Mapping[str, Any]:
    try:
        return run_dir.ranges().read_record(name, fingerprint).computed_by
    except DamagedFragment:
        return {}  # `verify` reports it


def verify_run(url: str) -> int:
    """Check every file of every product and reject what is damaged.

    Returns 0 if nothing is damaged, the archive included, and the fragments are complete, else 1.
    """
    run_dir, run = open_run(url)
    found = run_dir.fragments.verify(run["fingerprint"])
    products = {folder: run_dir.ranges(folder).verify(run["fingerprint"]) for folder in run_dir.products()}
    rejected = found.rejected + [
        (f"{folder}/{name}", reason) for folder, product in products.items() for name, reason in product.rejected
    ]
    for name, reason in rejected:
        print(printable(f"rejected {name}: {reason}", None))
    gaps = missing(cover(found.records, run["num_samples"]), run["num_samples"])
    keys = {str(record.computed_by.get("numerics_key")) for record in found.records.values()}
    print(f"{counted(len(found.records), 'fragment')} OK, {len(found.rejected)} rejected")
    for folder, product in products.items():
        print(printable(f"{folder}: {len(product.records)} OK, {len(product.rejected)} rejected", None))
    if len(keys) > 1:
        print(
            printable(f"the fragments were computed under {len(keys)} numerics keys: {'; '.join(sorted(keys))}", None)
        )
    for file, hashes in mixed_code(found.records.values()).items():
        print(printable(f"the fragments were computed by {len(hashes)} versions of {file}: {', '.join(hashes)}", None))
    if gaps:
        count = sum(stop - start for start, stop in gaps)
        print(f"{count} of {run['num_samples']} samples are missing; rerun the run's command to generate them")
    archive = run_dir.archive_name(*shape_of(run)[:2])
    written = not gaps and run_dir.has(archive)
    damage = archive_damage(run_dir, run, found.records) if written else None
    if damage:
        print(f"the archive is damaged: {damage}; rerun the run's command, or `ray-sampler merge`, to write it")
    elif written:
        print(f"{archive} OK")
    return 1 if gaps or rejected or damage else 0


def archive_damage(run_dir: RunDir, run: Mapping[str, Any], records: Mapping[FragmentName, Record]) -> str | None:
    """What is wrong with the archive beside the checksums of its fragments; None if nothing is."""
    num_samples, shape, labelled, _ = shape_of(run)
    contents = {name: content_of(record) for name, record in records.items()}
    pieces = cover(records, num_samples)
    try:
        layout = lay_out(run_dir, pieces, contents, num_samples, shape, labelled, run["fingerprint"])
    except DamagedPiece as damage:
        return str(damage)
    return None if archive_intact(run_dir, layout) else "its size or a checksum is not that of the fragments"


def mixed_code(records: Iterable[Record]) -> dict[str, list[str]]:
    """Files of the user's code of which fragments have several versions, with the hashes of these."""
    sources = [record.computed_by.get("source") for record in records]
    known = [source if isinstance(source, dict) else {} for source in sources]
    files = sorted({file for source in known for file in source})
    hashes = {file: sorted({str(source.get(file, "not recorded")) for source in known}) for file in files}
    return {file: found for file, found in hashes.items() if len(found) > 1}


def merge_run(url: str) -> int:
    """Write the archive of a complete set of fragments.

    Raises:
        RunError: samples are missing, or a fragment is damaged.
    """
    run_dir, run = open_run(url)
    found = run_dir.fragments.verify(run["fingerprint"])
    num_samples = run["num_samples"]
    pieces = cover(found.records, num_samples)
    gaps = missing(pieces, num_samples)
    if gaps:
        count = sum(stop - start for start, stop in gaps)
        raise RunError(
            f"{count} of {num_samples} samples are missing from {run_dir.url}; run the run's command to sample them"
        )
    contents = {name: content_of(record) for name, record in found.records.items()}
    height, width, channels = run["image_shape"]
    try:
        layout = merge(
            run_dir, pieces, contents, num_samples, (height, width, channels), run["labelled"], run["fingerprint"]
        )
    except DamagedPiece as damage:
        raise RunError(f"{damage} while it was merged; run merge again") from damage
    print(run_dir.path_of(run_dir.archive_name(num_samples, layout.image_shape)))
    return 0


def preview_run(url: str) -> int:
    """Draw preview.png from the fragments that are there.

    Raises:
        RunError: there is none.
    """
    run_dir, run = open_run(url)
    sheet = Sheet(run_dir, run["fingerprint"], run["num_samples"], run["settings"])
    tiles = sheet.read(run_dir.fragments.list().fragments)
    if not tiles:
        raise RunError(f"{run_dir.url} has no readable fragment to draw yet")
    run_dir.write_file(PREVIEW, sheet.draw(tiles))
    print(run_dir.path_of(PREVIEW))
    return 0
