"""What a checkpoint is, and the command line that samples it: `ray-sampler inspect`."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_sampler.config import RunConfig
from ray_sampler.errors import printable, redact
from ray_sampler.networks.called import Called
from ray_sampler.networks.family import Network, beside_user
from ray_sampler.networks.opening import open_network
from ray_sampler.presets import BUNDLED, check_bundled, model_of
from ray_sampler.resolve import given_values, resolve
from ray_sampler.sampling.parameterisation import Parameterisation
from ray_sampler.sampling.plan import parameterisation_of
from ray_sampler.sampling.trial import TRIAL_S, try_network, within

SHOWN = ("sampler", "steps", "clip_denoised", "rounding", "state", "precision")
"""Settings whose defaults for the model are shown."""


def inspect(config: RunConfig) -> dict[str, Any]:
    """A description of a model; None where neither the file nor a flag has a value. Errors are those of `inspected`."""
    return inspected(config)[0]


def inspected(config: RunConfig) -> tuple[dict[str, Any], str | None]:
    """What a model is, and what the user should know of how its file was read.

    Args:
        config: with options of the model and its architecture.

    Raises:
        RequestError: there is no such file, it is not a checkpoint that can be sampled, or a flag contradicts it.
    """
    model, brought = model_of(config)
    check_bundled(model, given_values(config))
    settings = brought | given_values(config)
    network = open_network(model, settings, config.given)
    spec = network.spec
    name = model if isinstance(model, str) else spec.options.name
    resolved = resolve(config, name, brought, spec)
    if network.own:
        kind = parameterisation_of(spec, resolved.sigma_min)
        try_own(network, kind, (resolved.sigma_max, resolved.sigma_min))
    levels = {name: getattr(resolved, name) for name in ("sigma_min", "sigma_max")}
    found = {
        "family": spec.family,
        "parameters": network.parameters,
        "shape": [spec.shape[0], None, None] if "image_size" in network.untold else list(spec.shape),
        "num_classes": spec.num_classes,
        "null_label": spec.null_label,
        **{name: None if level is None else float(level) for name, level in levels.items()},
        "weights_key": network.key,
        "weights": network.weights,
        "defaults": {name: getattr(resolved, name) for name in SHOWN},
        "command": command(name, config, network),
    }
    return found, network.note


def try_own(network: Network, kind: Parameterisation, levels: tuple[float, float]) -> None:
    """Find out of a user's network what a run would: whether it can be sent to actors, and called.

    Raises:
        RequestError: it cannot; says why.
    """
    from ray_sampler.cluster.shipping import pickled_by_value  # imports Ray, and starts none

    spec, module = network.spec, network.build("fp32")
    pickled_by_value(network, module, "fp32")
    assert isinstance(module, Called)
    labels = (0, spec.num_classes - 1 if spec.null_label is None else spec.null_label) if spec.num_classes else None
    copy = module.another()
    with beside_user():
        for warning in within(TRIAL_S, lambda: try_network(copy, kind, spec.shape, levels, labels)) or ():
            print(f"ray-sampler: {warning}", file=sys.stderr)


def command(model: str, config: RunConfig, network: Network) -> str:
    """The command line that samples a model."""
    flags: dict[str, Any] = {} if config.preset and not config.model else {"model": redact(model)}
    flags |= {
        name: value for name, value in sorted(given_values(config).items()) if name not in ("model", "model_path")
    }
    latent = network.spec.latent or network.spec.shape[0] not in (1, 3)
    if latent and model not in BUNDLED:  # which brings its decoder
        flags["decoder"] = "none"
    words = [word for name, value in flags.items() for word in (f"--{name}", shlex.quote(printable(value)))]
    words += [word for name, placeholder in network.untold.items() for word in (f"--{name}", placeholder)]
    return " ".join(("ray-sampler sample", *words))


def levels_of(found: dict[str, Any]) -> str:
    """The range that is sampled by default, for people."""
    low, high = found["sigma_min"], found["sigma_max"]
    return "?" if None in (low, high) else f"{low:g} to {high:g}"


def print_inspection(config: RunConfig, as_json: bool) -> int:
    """Print what a model is, as JSON or for people."""
    found, note = inspected(config)
    if as_json:
        print(json.dumps(found, indent=2))
        if note:
            print(f"ray-sampler: {note}", file=sys.stderr)
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
        "noise levels": levels_of(found),
        "weights": found["weights"][:16]
        + (f" under {printable(found['weights_key'])}" if found["weights_key"] else ""),
        "defaults": ", ".join(f"{name} {value}" for name, value in found["defaults"].items()),
    }
    rows |= {"note": printable(note, None)} if note else {}
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(table)
    console.print("\nsample it:")
    print(f"  {found['command']}")
    if found["shape"][1] is None:
        console.print("\nthe values in capitals cannot be inferred from the weights; use --preset for published models")
    return 0
