"""From a request to a resolved one: every option is the user's, else a preset's, else the file's, else its default."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ray_sampler.config import HEADINGS, RunConfig
from ray_sampler.errors import redact, require, shortened
from ray_sampler.networks.families import ARCHITECTURE, BROUGHT, told_by_flags
from ray_sampler.networks.sources import not_there
from ray_sampler.options import flags_of, of
from ray_sampler.presets import BUNDLED, OBJECT, model_name, model_of
from ray_sampler.sampling.multistep_solvers import IndexOptions, indices_of
from ray_sampler.sampling.options import NoiseOptions, PlanOptions, check_seeds
from ray_sampler.sampling.schedules import name_of
from ray_sampler.sampling.stepping import (
    check_counts,
    check_steps,
    nfe_of,
    schedule_of,
    settle,
    sigmas_of,
    still_brought,
)
from ray_sampler.storage.number_file import listed_numbers, read_levels

if TYPE_CHECKING:
    from ray_sampler.networks.family import NetworkSpec

FRESH_SEED_BITS = 24
"""Of the seed that --generator dummy draws: small enough for num_samples * seed to fit in 64 bits."""

URLS = {"model", "weights", "guide", "guide_weights", "decoder", "latents", "labels", "output", "score", "address"}
URLS |= {"features_weights", "model_path"}
"""Options that may hold a credential."""

NOT_SHOWN = ("model_path", "use_fp16", "dry_run")
"""Options that say what another one says, or nothing of the run."""


NEVER_EMPTY = {
    *("model", "preset", "weights", "weights_key", "guide_weights", "labels", "latents", "address"),
    *("features", "features_weights"),
}
"""Options of which nothing at all, as of a shell's variable without a value, would be taken for what is not given."""


def check(config: RunConfig) -> None:
    """Check what can be checked before anything is opened.

    Raises:
        RequestError: a value is wrong, by itself or beside another.
    """
    given = given_values(config)
    for name in NEVER_EMPTY & given.keys():
        require(given[name] != "", f"--{name} is empty; give a value, or leave it out")
    check_counts(given)
    ends = {"sigma_min", "sigma_max"}
    config.filled(dict.fromkeys(() if ends <= config.given else ends)).check()  # the file may decide the other end
    check_seeds(of(NoiseOptions, config), of(PlanOptions, config).num_samples)


def given_values(config: RunConfig) -> dict[str, Any]:
    """The options that the user gave, by name."""
    return {name: getattr(config, name) for name in config.given}


def resolve(
    config: RunConfig,
    model: Any,
    brought: Mapping[str, Any],
    spec: NetworkSpec | None,
    earlier: Mapping[str, Any] = MappingProxyType({}),
) -> RunConfig:
    """The request with nothing left None, except where None means "none" or depends on the fleet.

    Args:
        config: the request, checked.
        model: a bundled model's name, a path or URL, or an object.
        brought: settings that the named model or preset brings, by flag name.
        spec: of the network; None where no file is opened: values that only the file determines stay None.
        earlier: the identity of a run that was begun in the same place; empty where there is none.

    Raises:
        RequestError: a value is wrong beside another.
    """
    given = given_values(config)
    settings = {name: flag.default for name, flag in flags_of(type(config)).items()}
    settings |= spec.brought | range_of(spec, earlier) if spec else told_by_flags({**brought, **given})
    settings |= still_brought(brought, given) | given
    if spec:
        settings |= dict.fromkeys(ARCHITECTURE) | spec.architecture
    settings |= settle(settings, given, read_levels)
    settings["model"] = model_name(model)
    if settings["use_fp16"] is not None and settings["precision"] == "auto":
        settings["precision"] = "fp16" if settings["use_fp16"] else "fp32"
    settings["shard_size"] = -(-settings["shard_size"] // settings["batch_size"]) * settings["batch_size"]
    settings["ts"] = ",".join(map(str, indices_of(of(IndexOptions, settings))))
    settings["labels"] = labels_of(settings, spec.unlabelled_hint if spec else "")
    resolved = config.filled(settings)
    if None not in (resolved.steps, resolved.sigma_min, resolved.sigma_max):
        check_steps(resolved, schedule_of(resolved), resolved.state)
    return resolved


def range_of(spec: NetworkSpec, earlier: Mapping[str, Any]) -> dict[str, float | None]:
    """The range of levels that is sampled by default: the network's own, else that of its kind.

    Where it comes from the kind, and a run was begun with the one that every network had first, it stays.
    """
    from ray_sampler.sampling.parameterisation import LEVELS
    from ray_sampler.sampling.plan import parameterisation_of

    own = {"sigma_min": spec.sigma_min, "sigma_max": spec.sigma_max}
    if spec.lacks:  # it is not known what it computes
        return own
    kinds = getattr(parameterisation_of(spec, LEVELS[0]), "levels", LEVELS) if None in own.values() else LEVELS
    every = zip(own.items(), kinds, LEVELS, strict=True)
    return {
        name: value if value is not None else first if earlier.get(name) == first else kind
        for (name, value), kind, first in every
    }


def without_file(config: RunConfig) -> RunConfig:
    """The request resolved without opening a model's file; values that only the file determines are None.

    Raises:
        RequestError: a value is wrong.
    """
    check(config)
    return resolve(config, *model_of(config), None)


def missing_files(config: RunConfig) -> list[str]:
    """What is to be said of local files that a request names and that are not there; nothing is opened.

    Raises:
        RequestError: as of `model_of`.
    """
    model, _ = model_of(config)
    rules = ("random", "balanced")
    labels = config.labels if config.labels not in rules and not listed_numbers(config.labels or "0") else None
    files = {name: getattr(config, name) for name in ("guide", "weights", "guide_weights", "score", "features_weights")}
    own = {"model": model if isinstance(model, str) else None, "labels": labels}
    names = {name: value for name, value in (own | files).items() if value}
    return [
        f"--{name} is {redact(value)}; {'there is no such file' if name == 'labels' else not_there(value, f'--{name}')}"
        for name, value in names.items()
        if "://" not in value
        and not value.startswith("python:")
        and value not in BUNDLED
        and value != "null"
        and not os.path.exists(os.path.expanduser(value))
    ]


def labels_of(settings: Mapping[str, Any], hint: str) -> str | None:
    """The label rule as requested; None for an unconditional network. Raises RequestError: it takes no labels."""
    labels = settings["labels"]
    require(
        labels is None or settings["class_cond"] is not False,
        f"--labels is {shortened(str(labels))!r}, but the model is unconditional; leave it out{hint}",
    )
    return labels or ("random" if settings["class_cond"] else None)


def settled(config: RunConfig, gpus: float, earlier: Mapping[str, Any]) -> RunConfig:
    """A resolved request with what was left to the moment; what an earlier start in the same place made of it stays.

    The precision auto is fp16 on a GPU and fp32 on a CPU; the generator dummy draws a fresh seed.

    Args:
        gpus: of an actor.
        earlier: the identity of the run that was begun in the same place; empty where there is none.
    """
    result: dict[str, Any] = {}
    if config.precision == "auto":
        result["precision"] = earlier.get("precision") or ("fp16" if gpus else "fp32")
    if config.generator == "dummy":
        seed = earlier.get("seed") if earlier.get("generator") == "dummy" else None
        result["seed"] = seed or 1 + secrets.randbits(FRESH_SEED_BITS)
    return config.filled(result)


def settings_json(config: RunConfig) -> dict[str, Any]:
    """Every setting of a resolved request under its flag's name, without a credential, for --dry_run and run.json."""
    flags = flags_of(type(config)).items()
    values = {name: (flag, getattr(config, name)) for name, flag in flags if name not in NOT_SHOWN}
    result = {
        name: value for name, (flag, value) in values.items() if flag.recorded or value not in (None, flag.default)
    }
    for url in URLS & result.keys():
        result[url] = redact(result[url])
    return result | {"s_tmax": str(float(result["s_tmax"]))}


def command_of(config: RunConfig) -> dict[str, Any] | None:
    """The command that a request is, as run.json and summary.json have it; None where a Model was given as an object.

    Without a credential, and without --overwrite: running it again must not delete what it made.
    """
    if str(config.model).startswith(OBJECT):
        return None
    in_help = [name for components in HEADINGS.values() for component in components for name in flags_of(component)]
    names = [name for name in in_help if name in config.given - {"overwrite", "dry_run"}]
    values = {name: getattr(config, name) for name in names}
    shown = {name: redact(value) if name in URLS else value for name, value in values.items()}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in shown.items()]
    return {"argv": ["sample", *arguments], "folder": os.getcwd(), "tag": config.tag}


def dry_run(config: RunConfig) -> dict[str, Any]:
    """The resolved run as JSON, without opening anything: values that only the checkpoint determines are None.

    Raises:
        RequestError: a value is wrong.
    """
    resolved = without_file(config)
    levels: dict[str, Any] = dict.fromkeys(("schedule", "nfe", "sigmas"))
    if resolved.steps is not None:
        schedule = schedule_of(resolved)
        levels |= {"schedule": name_of(schedule), "nfe": nfe_of(resolved, resolved.steps)}
        if resolved.sigma_min is not None and resolved.sigma_max is not None:
            levels["sigmas"] = sigmas_of(resolved, schedule)
    flags = flags_of(RunConfig)
    unknown = {
        name: None
        for name in (*ARCHITECTURE, *BROUGHT)
        if getattr(resolved, name) is None and flags[name].default is not None
    }
    return settings_json(resolved) | unknown | levels
