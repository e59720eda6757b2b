"""The only way from the golden tests into the project: when a module moves, re-point its import here.

Nothing here decides anything. Requests are dicts of flags, everything returned is plain data.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ray_sampler
from ray_sampler import config
from ray_sampler.cli import main
from ray_sampler.cluster import driver, job
from ray_sampler.networks.adm import spec_of
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.opening import open_network
from ray_sampler.options import of
from ray_sampler.planning import identity, plan_of
from ray_sampler.presets import BUNDLED, model_of
from ray_sampler.reporting.progress import reporter
from ray_sampler.resolve import given_values, resolve, settled
from ray_sampler.sampling import numerics
from ray_sampler.sampling.plan import MAIN, sample_block
from ray_sampler.storage import record
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import Samples
from tests.loading import loaded


def identity_of(
    flags: Mapping[str, Any], weights_hash: str | None, gpus: float = 0.0, dummy_seed: int | None = None
) -> dict[str, Any]:
    """The identity of the run that a request means.

    Args:
        weights_hash: 64 hexadecimal digits; None reads the weights that the request names.
        gpus: GPUs of an actor, which decide the precision auto.
        dummy_seed: what --generator dummy drew.
    """
    request = config.RunConfig(**flags)
    model, brought = model_of(request)
    if model == "digits":  # which meant other weights in version 1
        model, brought = "digits-v1", dict(BUNDLED["digits-v1"].settings)
    settings = brought | given_values(request)
    spec = spec_of(of(AdmOptions, settings), settings)
    there = {} if dummy_seed is None else {"generator": "dummy", "seed": dummy_seed}
    resolved = settled(resolve(request, model, brought, spec), gpus, there)
    weights = open_network(model, settings).weights if weights_hash is None else weights_hash
    return identity(resolved, plan_of(resolved, {MAIN: spec}), {MAIN: spec}, {MAIN: weights})


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """The fingerprint of an identity, 64 hexadecimal digits."""
    return record.fingerprint(identity)


def run_json_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a new run of the request writes as run.json; reads the weights, writes nothing, needs no Ray."""
    return job.prepare(config.RunConfig(**flags)).record()


def dry_run_of(arguments: list[str]) -> dict[str, Any]:
    """What `ray-sampler sample --dry_run` prints for a command line."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["sample", *arguments, "--dry_run"]) == 0
    resolved: dict[str, Any] = json.loads(printed.getvalue())
    return resolved


def run(flags: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Fill the archive of a request, on whatever Ray there is: the archive's path and the summary."""
    return filled(ray_sampler.run(ray_sampler.RunConfig(**flags)), flags["batch_size"])


def run_together(requests: Mapping[Path, Mapping[str, Any]]) -> list[tuple[Path, dict[str, Any]]]:
    """The same for several requests, each made in a folder; those of one network share actors."""
    jobs = []
    for folder, flags in requests.items():
        with contextlib.chdir(folder):
            jobs.append(job.prepare(config.RunConfig(**flags)))
    with reporter("none", False) as report:
        results = driver.drive(jobs, report)
    return [filled(result, flags["batch_size"]) for result, flags in zip(results, requests.values(), strict=True)]


def filled(result: driver.RunResult, batch_size: int) -> tuple[Path, dict[str, Any]]:
    """The archive's path and the summary, which names this machine's CPU as version 1 did.

    Numerics keys hold more now, and no pixel depends on them.
    """
    here = numerics.numerics_key(torch.device("cpu"), batch_size, "fp32", "auto")
    makers = [
        maker | {"key": numerics_key(batch_size)} if maker["key"] == here else maker
        for maker in result.summary["computed_by"]
    ]
    return Path(result.archive), result.summary | {"computed_by": makers}


def merge(folder: Path) -> None:
    """Write the archive of a run directory whose fragments are all there."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["merge", str(folder)]) == 0


def read_fragment(path: Path) -> dict[str, Any]:
    """A fragment's start, images (n, H, W, 3) uint8, labels (n,) int32, fingerprint and computed_by."""
    fragment = ray_sampler.read_fragment(str(path))
    return {
        "start": fragment.samples.start,
        "images": fragment.samples.images,
        "labels": fragment.samples.labels,
        "fingerprint": fragment.record.fingerprint,
        "computed_by": dict(fragment.record.computed_by),
    }


def fragment_bytes(
    start: int,
    images: np.ndarray,
    labels: np.ndarray | None,
    fingerprint: str,
    computed_by: Mapping[str, Any],
    format: Any,
) -> bytes:
    """The bytes of a fragment, "parquet" or "npz"."""
    return encode(Samples.of(start, images, labels), fingerprint, computed_by, format)[0]


def samples_of(flags: Mapping[str, Any], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The first `count` samples of a request, computed in one batch, on one thread.

    Returns:
        The solver's result (count, C, H, W) in the dtype of its state, what is written of it (count, H, W, C), uint8 or
        float32, and the labels (count,) int64 or None.
    """
    prepared = job.prepare(config.RunConfig(**flags))
    networks = {
        role: loaded(network) if network.tensors else network.build("fp32")  # a user's own has its tensors already
        for role, network in prepared.networks.items()
    }
    plan = prepared.plan
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            x, labels = sample_block(networks, plan, torch.arange(count))
            return (
                x.numpy(),
                plan.finisher.finish(x, networks)["image"].numpy(),
                None if labels is None else labels.numpy(),
            )
    finally:
        torch.set_num_threads(threads)


def numerics_key(batch_size: int) -> str:
    """The numerics key that version 1 gave to this machine's CPU for float32 and --compile auto."""
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"cpu {kernels}, torch {torch.__version__}, batch {batch_size}, fp32, compile auto"


def weights_of_tiny(architecture: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Random float16 weights of an ADM network; used once, to make tiny.safetensors."""
    random = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(tensor.shape, generator=random) * (0.04 if tensor.ndim > 1 else 0.3)).half()
        for name, tensor in UNet(AdmOptions(**architecture)).state_dict().items()
    }
