"""Commands of `ray-sampler` other than `sample`: their arguments, and what they do."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from ray_sampler.errors import RequestError
from ray_sampler.flags import Parser, flags_among, given_values
from ray_sampler.options import flags_of

if TYPE_CHECKING:
    from ray_sampler.config import RunConfig


def request_of(arguments: argparse.Namespace) -> RunConfig:
    """The request of the arguments of `sample` or `inspect`.

    Raises:
        RequestError: a value is not of its flag's kind.
    """
    from ray_sampler.config import RunConfig

    return RunConfig(**given_values(arguments, RunConfig))


def declare_folder(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="URL", help="the run directory: a local path or any fsspec URL")


def declare_status(parser: Parser) -> None:
    declare_folder(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--watch", action="store_true", help="print again every 10 seconds, until the run is complete")


def folder_of(command: str, arguments: argparse.Namespace) -> str:
    """Raises RequestError: the run directory is missing."""
    if arguments.url is None:
        raise RequestError(f"`ray-sampler {command}` needs the path or URL of a run directory")
    url: str = arguments.url
    return url


def execute_status(arguments: argparse.Namespace) -> int:
    from ray_sampler.run_folder import print_status

    return print_status(folder_of("status", arguments), arguments.json, arguments.watch)


def declare_resume(parser: Parser) -> None:
    declare_folder(parser)
    declare_fleet(parser)


def declare_fleet(parser: Parser) -> None:
    """The flags of the fleet and of reporting, of a command whose other arguments are a file or folder."""
    from ray_sampler.config import FleetOptions
    from ray_sampler.reporting.options import ReportingOptions

    parser.declare("fleet", flags_among((FleetOptions,)))
    parser.declare("reporting", flags_among((ReportingOptions,), leave_out=("dry_run",)))


def execute_verify(arguments: argparse.Namespace) -> int:
    from ray_sampler.run_folder import verify_run

    return verify_run(folder_of("verify", arguments))


def execute_merge(arguments: argparse.Namespace) -> int:
    from ray_sampler.run_folder import merge_run

    return merge_run(folder_of("merge", arguments))


def execute_preview(arguments: argparse.Namespace) -> int:
    from ray_sampler.run_folder import preview_run

    return preview_run(folder_of("preview", arguments))


def declare_inspect(parser: Parser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a bundled model, a checkpoint or python:module:function"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    from ray_sampler.networks.families import ArchitectureOptions
    from ray_sampler.presets import ModelOptions

    components = ModelOptions, ArchitectureOptions
    parser.declare("model and architecture", flags_among(components, leave_out=("model", "model_path")))


def execute_inspect(arguments: argparse.Namespace) -> int:
    from ray_sampler.inspection import print_inspection

    if arguments.model is None and arguments.preset is None:
        raise RequestError(
            "`ray-sampler inspect` needs a model: a bundled one, a checkpoint's path or URL, or --preset"
        )
    return print_inspection(request_of(arguments), arguments.json)


def declare_spot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "when", nargs="?", default="", metavar="aws|gcp|now", help="whose notice to wait for; now waits for none"
    )
    parser.add_argument("--seconds", metavar="FLOAT", default="100", help="of now: how long the node stays (100)")
    parser.add_argument("--node-id", metavar="TEXT", help="the Ray node to drain (default: all on this machine)")


def execute_spot(arguments: argparse.Namespace) -> int:
    from ray_sampler.cluster.spot import leave_when

    leave_when(arguments.when, arguments.seconds, arguments.node_id)
    return 0


def execute_presets(arguments: argparse.Namespace) -> int:
    from ray_sampler.preset_table import print_presets

    print_presets()
    return 0


def declare_export(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="RUN|ARCHIVE", help="a run directory or an archive: a path or URL")
    parser.add_argument("--output", metavar="DIR", help="the folder of the PNGs: a local path or any fsspec URL")
    parser.add_argument("--subdirs", action="store_true", help="a folder for each thousand, as 001000/001234.png")


def execute_export(arguments: argparse.Namespace) -> int:
    from ray_sampler.storage.pictures import export

    if arguments.url is None or arguments.output is None:
        raise RequestError("`ray-sampler export` needs a run directory or an archive, and --output DIR")
    written, kept = export(arguments.url, arguments.output, arguments.subdirs)
    print(f"{written} PNGs written, {kept} were there: {arguments.output}")
    return 0


def declare_score(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="SOURCE", help="a run directory, an archive or a folder of pictures")
    from ray_sampler.config import ScoreOutputOptions
    from ray_sampler.scoring.options import ScoreOptions

    reference = replace(flags_of(ScoreOptions)["score"], name="reference")
    parser.declare("score", [reference, *flags_among((ScoreOptions, ScoreOutputOptions), leave_out=("score",))])
    declare_fleet(parser)


def execute_score(arguments: argparse.Namespace) -> int:
    from ray_sampler.config import ScoreRequest

    if arguments.url is None:
        raise RequestError("`ray-sampler score` needs a run directory, an archive or a folder of pictures")
    if not arguments.reference:
        raise RequestError("--reference is missing; give what the pictures are to be compared with")
    request = ScoreRequest(score=arguments.reference, **given_values(arguments, ScoreRequest))
    request.check()  # what is wrong is said before torch and Ray are imported
    from ray_sampler.cluster.scoring import score

    print(json.dumps(score(arguments.url, request), indent=1), flush=True)
    return 0


def declare_reference(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="IMAGES", help="a folder of pictures, an archive or a run directory")
    parser.add_argument("--output", metavar="FILE.npz", help="the file to write: a local path or any fsspec URL")
    from ray_sampler.scoring.options import FeatureOptions

    parser.declare("features", flags_among((FeatureOptions,)))


def execute_reference(arguments: argparse.Namespace) -> int:
    if arguments.url is None or arguments.output is None:
        raise RequestError("`ray-sampler reference` needs pictures, and --output FILE.npz")
    from ray_sampler.scoring.making import make_reference
    from ray_sampler.scoring.options import FeatureOptions

    options = FeatureOptions(**given_values(arguments, FeatureOptions))
    print(f"statistics of {make_reference(arguments.url, options, arguments.output)} pictures: {arguments.output}")
    return 0
