"""Commands of `ray-sampler` that take pictures and write something else: their arguments, and what they do."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from ray_sampler.errors import RequestError
from ray_sampler.flags import Parser, flags_among, given_values
from ray_sampler.options import flags_of


def declare_export(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="RUN|ARCHIVE", help="a run directory or an archive: a path or URL")
    parser.add_argument("--output", metavar="DIR", help="the folder of the PNGs: a local path or any fsspec URL")
    parser.add_argument("--subdirs", action="store_true", help="a folder for each thousand, as 001000/001234.png")


def execute_export(arguments: argparse.Namespace) -> int:
    from ray_sampler.storage.export import export

    if arguments.url is None or arguments.output is None:
        raise RequestError("`ray-sampler export` needs a run directory or an archive, and --output DIR")
    written, kept = export(arguments.url, arguments.output, arguments.subdirs)
    print(f"{written} PNGs written, {kept} were there: {arguments.output}")
    return 0


def declare_score(parser: Parser) -> None:
    parser.add_argument("url", nargs="?", metavar="SOURCE", help="a run directory, an archive or a folder of pictures")
    from ray_sampler.config import ScoreRequest

    reference = replace(flags_of(ScoreRequest)["score"], name="reference")
    parser.declare("score", [reference, *flags_among((ScoreRequest,), leave_out=("score", "dry_run"))])


def execute_score(arguments: argparse.Namespace) -> int:
    from ray_sampler.config import ScoreRequest

    if arguments.url is None:
        raise RequestError("`ray-sampler score` needs a run directory, an archive or a folder of pictures")
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
