"""What a checkpoint is, and the command line that samples it: `ray-sampler inspect`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_sampler.config import PrecisionOptions
from ray_sampler.errors import printable, redact
from ray_sampler.networks import adm
from ray_sampler.networks.family import Network
from ray_sampler.networks.opening import open_network
from ray_sampler.presets import ModelOptions, settings_for
from ray_sampler.resolved import family_settings
from ray_sampler.sampling.options import DecoderOptions, PlanOptions
from ray_sampler.sampling.plan import parameterisation_of
from ray_sampler.sampling.schedules import ScheduleOptions
from ray_sampler.sampling.solvers import SolverOptions

DEFAULTS = {
    "sampler": SolverOptions,
    "steps": ScheduleOptions,
    "clip_denoised": PlanOptions,
    "rounding": DecoderOptions,
    "state": PlanOptions,
    "precision": PrecisionOptions,
}
"""Settings that are shown, and who declares their defaults."""

PLACEHOLDERS = {"image_size": "SIZE", "num_head_channels": "CHANNELS"}


def inspect(options: ModelOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is; what neither the file nor a flag tells is None.

    Args:
        given: architecture flags, by name.

    Raises:
        RequestError: there is no such file, it is no checkpoint that can be sampled, or a flag contradicts it.
    """
    model, brought = settings_for(options)
    settings = brought | dict(given) | {"weights": options.weights, "tag": options.tag}
    settings |= {"weights_key": options.weights_key}
    network = open_network(model, settings, frozenset(brought) | frozenset(given))
    spec = network.spec
    unknown = untold(network, settings)
    shape = [spec.shape[0], None, None] if "image_size" in unknown else list(spec.shape)
    resolved = family_settings(spec) | brought
    parameterisation_of(spec, float(resolved["sigma_min"]))
    return {
        "family": spec.family,
        "parameters": network.parameters,
        "shape": shape,
        "num_classes": spec.num_classes,
        "null_label": spec.null_label,
        "sigma_min": float(resolved["sigma_min"]),
        "sigma_max": float(resolved["sigma_max"]),
        "weights_key": network.key,
        "weights": network.weights,
        "defaults": {name: resolved.get(name, getattr(owner(), name)) for name, owner in DEFAULTS.items()},
        "command": command(model, options, given, network, unknown),
    }


def untold(network: Network, settings: Mapping[str, Any]) -> dict[str, str]:
    """Flags whose values neither the file nor a flag tells, with a placeholder for each."""
    if network.spec.family != "adm":
        return {}
    return {name: PLACEHOLDERS[name] for name in adm.untold(settings)}


def command(
    model: str, options: ModelOptions, given: Mapping[str, Any], network: Network, unknown: Mapping[str, str]
) -> str:
    """The command line that samples a model."""
    flags: dict[str, Any] = {} if options.preset and not options.model else {"model": redact(model)}
    flags |= {name: value for name, value in vars(options).items() if value and name not in ("model", "model_path")}
    flags |= given
    spec = network.spec
    if spec.latent or spec.shape[0] not in (1, 3):
        flags["decoder"] = "none"
    words = [word for name, value in flags.items() for word in (f"--{name}", shlex.quote(printable(value)))]
    words += [word for name, placeholder in unknown.items() for word in (f"--{name}", placeholder)]
    return " ".join(("ray-sampler sample", *words))


def print_inspection(options: ModelOptions, given: Mapping[str, Any], as_json: bool) -> int:
    """Print what a model is, as JSON or for people."""
    found = inspect(options, given)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    table = Table(show_header=False, box=None, pad_edge=False)
    shape = " x ".join("?" if n is None else str(n) for n in found["shape"])
    classes = found["num_classes"] or "none (unconditional)"
    rows = {
        "family": found["family"],
        "parameters": f"{found['parameters']:,}",
        "shape of x": shape,
        "classes": str(classes),
        "null label": "none" if found["null_label"] is None else str(found["null_label"]),
        "noise levels": f"{found['sigma_min']:g} to {found['sigma_max']:g}",
        "weights": found["weights"][:16]
        + (f" under {printable(found['weights_key'])}" if found["weights_key"] else ""),
        "defaults": ", ".join(f"{name} {value}" for name, value in found["defaults"].items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(table)
    console.print("\nsample it:")
    print(f"  {found['command']}")
    if found["shape"][1] is None:
        console.print("\nthe weights do not tell SIZE and CHANNELS; --preset brings them for published checkpoints")
    return 0
