"""Distance to real digits against NFE for every solver, and against guidance: samples, measures and draws them.

Every point has the same noise and labels. The measures are those of evaluate.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from data import Digits
from evaluate import measure
from ray_sampler import RequestError, RunConfig
from ray_sampler.cluster.job import prepare
from ray_sampler.networks.family import Network
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.plan import MAIN
from ray_sampler.sampling.schedules import name_of

ROOT = Path(__file__).resolve().parents[2]
BATCH = 50


class Line(NamedTuple):
    """A solver on the picture."""

    flags: dict[str, Any]
    colour: str
    dashes: str = "-"
    """Solid for the ODE, dashed where fresh noise is added."""


LINES = {
    "euler": Line({"sampler": "euler"}, "#9aa0a6"),
    "heun": Line({"sampler": "heun"}, "#202124"),
    "dpm": Line({"sampler": "dpm"}, "#795548"),
    "dpmpp_2m": Line({"sampler": "dpmpp_2m"}, "#1a73e8"),
    "dpmpp_3m": Line({"sampler": "dpmpp_3m"}, "#8430ce"),
    "unipc": Line({"sampler": "unipc"}, "#188038"),
    "ipndm": Line({"sampler": "ipndm"}, "#d93025"),
    "deis": Line({"sampler": "deis"}, "#e37400"),
    "dpmpp_2m_sde": Line({"sampler": "dpmpp_2m_sde"}, "#1a73e8", "--"),
    "dpmpp_3m_sde": Line({"sampler": "dpmpp_3m_sde"}, "#8430ce", "--"),
    "ancestral": Line({"sampler": "ancestral"}, "#9aa0a6", "--"),
    "restart": Line({"sampler": "restart", "restarts": "2,1,0.1,0.6"}, "#202124", "--"),
}
"""By the name in the legend."""


def module_of(network: Network) -> nn.Module:
    """An opened network with its tensors, ready to compute on a CPU."""
    module = network.build("fp32")
    placed = {}
    for name, wanted in module.state_dict().items():
        data = torch.empty_strided(wanted.shape, wanted.stride(), dtype=wanted.dtype)
        placed[name] = data.copy_(network.tensors[name])
    module.load_state_dict(placed, assign=True)
    return network.prepare(module.requires_grad_(False).eval(), "fp32")


def measured(arguments: argparse.Namespace, **flags: Any) -> dict[str, Any] | None:
    """What the model's samples are like with these flags; None for a request that is refused."""
    config = RunConfig(
        model=arguments.model, num_samples=arguments.samples, labels="balanced", seed=arguments.seed, **flags
    )
    try:
        job = prepare(config)
    except RequestError as error:
        print(f"{flags}: {error}", file=sys.stderr)
        return None
    plan = job.plan
    engine = Engine({MAIN: module_of(job.networks[MAIN])}, batch_size=BATCH, device=torch.device("cpu"), compile="off")
    began = time.monotonic()
    pictures = engine.sample(plan, 0, arguments.samples)()
    seconds = time.monotonic() - began
    images = (pictures.columns["image"].transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
    m = measure(Digits(images, pictures.columns["label"].astype(np.int64)), arguments.cache)
    return {
        "solver": plan.sampler,
        "steps": plan.schedule.steps,
        "schedule": name_of(plan.schedule),
        "nfe": plan.evaluations(),
        "guidance": plan.guidance.guidance,
        "frechet": round(m.frechet, 4),
        "frechet_real": round(m.frechet_real, 4),
        "agreement": round(m.agreement, 4),
        "within_class_variance": round(m.within_class_variance, 2),
        "within_class_variance_real": round(m.within_class_variance_real, 2),
        "seconds": round(seconds, 1),
    }


def all_solvers(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each solver and NFE: as many evaluations as fit."""
    for name, line in LINES.items():
        for nfe in arguments.nfe:
            row = measured(arguments, nfe=nfe, guidance=1.0, **line.flags)
            if row is not None:
                yield row | {"solver": name}


def all_weights(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each guidance weight, with the model's own solver."""
    for weight in arguments.guidance:
        row = measured(arguments, guidance=weight)
        if row is not None:
            yield row


def draw(results: dict[str, Any], path: Path) -> None:
    """The picture: Frechet distance on a log scale against NFE."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    rows = results["rows"]
    for name, line in LINES.items():
        points = sorted((row["nfe"], row["frechet"]) for row in rows if row["solver"] == name)
        axes.plot(*zip(*points, strict=True), line.dashes, color=line.colour, marker="o", markersize=4, label=name)
    axes.axhline(rows[0]["frechet_real"], color="#9aa0a6", linewidth=0.8, linestyle=":")
    axes.annotate(
        "real to real", (0.01, rows[0]["frechet_real"]), xycoords=("axes fraction", "data"), ha="left", va="bottom"
    )
    axes.set_xticks(range(min(row["nfe"] for row in rows), 1 + max(row["nfe"] for row in rows)))
    axes.set(
        yscale="log",
        xlabel="NFE, evaluations of the denoiser for one sample",
        ylabel="Frechet distance to real digits",
        title=f"{results['samples']} samples of {results['model']} for each point, the same noise and labels",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--samples", type=int, default=500, help="for each point")
    parser.add_argument("--nfe", type=int, nargs="+", default=[6, 10, 16])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0, 3.0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder where the trained classifier is kept for the next time")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "solvers.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "solvers.png")
    parser.add_argument("--draw", action="store_true", help="draw the results that are there; sample nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        results = json.loads(arguments.results.read_text())
    else:
        results = {"model": arguments.model, "samples": arguments.samples, "seed": arguments.seed}
        for part, rows in (("rows", all_solvers(arguments)), ("guidance", all_weights(arguments))):
            results[part] = []
            for row in rows:
                print(json.dumps(row), file=sys.stderr, flush=True)
                results[part].append(row)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, arguments.picture)


if __name__ == "__main__":
    main()
