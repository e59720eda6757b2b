"""One network on one device, many shards."""

from __future__ import annotations

import os
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from ray_sampler.cluster.metrics import ActorMetrics
from ray_sampler.config import Architecture, Compile, FragmentFormat, Precision, RunError, Sampling
from ray_sampler.models.checkpoint import build
from ray_sampler.sampling.engine import Engine, Pictures, numerics_key
from ray_sampler.sampling.labels import LabelRule
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import Record, Samples
from ray_sampler.storage.retry import HIDDEN_S
from ray_sampler.storage.run_dir import FragmentName, RunDir

PackedWeights = dict[str, tuple[np.ndarray, str, tuple[int, ...]]]
"""Bytes, dtype and stored shape of each tensor: what Ray keeps once per node and maps into every actor."""

CONCURRENCY = 10
"""Calls that an actor takes at once: shards in flight, at most eight, and questions beside them."""


@dataclass(frozen=True)
class ActorSpec:
    """What an actor must know, the weights apart."""

    output: str
    fingerprint: str
    architecture: Architecture
    sampling: Sampling
    labels: LabelRule | None
    precision: Precision
    num_samples: int
    batch_size: int
    fragment_format: FragmentFormat
    compile: Compile
    cores: int
    """CPU cores of an actor without a GPU."""
    probe: str
    """Name of the file by which the driver shows that it writes to the same place."""


@dataclass(frozen=True)
class ActorInfo:
    """Where an actor runs."""

    node_id: str
    pid: int
    device: str
    numerics_key: str


@dataclass(frozen=True)
class ShardResult:
    """What comes back of a shard: no images."""

    name: FragmentName
    record: Record
    compute_s: float
    wait_s: float
    """Time the device had nothing to do before this shard."""
    upload_s: float
    """Encoding and writing."""


def pack(weights: dict[str, Tensor]) -> PackedWeights:
    """The weights as arrays of bytes, those of convolutions channels last, as networks take them.

    They are laid out here and not by `fit`, whose tensors may be the mapped file and live as long as the run.
    """
    stored = {name: t.permute(0, 2, 3, 1) if t.dim() == 4 else t for name, t in weights.items()}
    return {
        name: (
            tensor.contiguous().view(torch.uint8).numpy(),
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        for name, tensor in stored.items()
    }


def unpack(packed: PackedWeights) -> dict[str, Tensor]:
    """Views of the packed bytes, which are shared memory and must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        stored = {
            name: torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
            for name, (data, dtype, shape) in packed.items()
        }
    return {name: t.permute(0, 3, 1, 2) if t.dim() == 4 else t for name, t in stored.items()}


class SamplerActor:
    """Samples shards and writes their fragments. All computing happens on one dedicated thread."""

    def __init__(self, spec: ActorSpec, packed: PackedWeights) -> None:
        self.spec = spec
        self.packed = packed
        self.run_dir = RunDir(spec.output)
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self.compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self.computed_until: float | None = None

    def start(self) -> ActorInfo:
        """Prove access to the output and load the network; to be called once, before anything else.

        Raises:
            RunError: this node does not share the output.
        """
        prove_access(self.run_dir, self.spec.probe)
        self.engine = self.compute.submit(self._build, self.packed).result()
        del self.packed
        self.metrics = ActorMetrics(self.spec.fingerprint[:8])
        return self.info()

    def _build(self, packed: PackedWeights) -> Engine:
        spec = self.spec
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        engine = Engine(
            build(spec.architecture, unpack(packed), spec.precision, self.device),
            spec.architecture,
            spec.sampling,
            spec.labels,
            num_samples=spec.num_samples,
            batch_size=spec.batch_size,
            device=self.device,
            compile=spec.compile,
            cores=spec.cores,
        )
        engine.warm_up()
        return engine

    def info(self) -> ActorInfo:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        key = numerics_key(self.device, self.spec.batch_size, self.spec.precision, self.spec.compile)
        return ActorInfo(ray.get_runtime_context().get_node_id(), os.getpid(), name, key)

    def evaluations(self) -> int:
        """Calls of the network so far: a number that rises shows that a slow shard is being computed."""
        return self.engine.evaluations

    def sample(self, start: int, stop: int) -> ShardResult:
        """Compute the samples [start, stop) and write their fragment.

        Raises:
            NonFiniteError, OutOfDeviceMemoryError: from the engine.
            RunError: the fragment cannot be written.
        """
        pictures, wait_s = self._compute(start, stop)
        began = time.perf_counter()
        samples = Samples(start, pictures.images, pictures.labels)
        name = FragmentName(start, stop, self.spec.fragment_format)
        data, record = encode(samples, self.spec.fingerprint, self._computed_by(pictures.seconds), name.format)
        self.run_dir.write_fragment(name, data)
        upload_s = time.perf_counter() - began
        self.metrics.count(stop - start, pictures.seconds, wait_s, upload_s)
        return ShardResult(name, record, pictures.seconds, wait_s, upload_s)

    def _compute(self, start: int, stop: int) -> tuple[Pictures, float]:
        def on_compute_thread() -> tuple[Any, float]:
            wait = 0.0 if self.computed_until is None else time.perf_counter() - self.computed_until
            finish = self.engine.sample(start, stop)
            self.computed_until = time.perf_counter()
            return finish, wait

        finish, wait_s = self.compute.submit(on_compute_thread).result()
        return finish(), wait_s

    def _computed_by(self, seconds: float) -> dict[str, Any]:
        info = self.info()
        return {
            "numerics_key": info.numerics_key,
            "device": info.device,
            "host": socket.gethostname(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "seconds": round(seconds, 3),
        }


def prove_access(run_dir: RunDir, probe: str) -> None:
    """Check that this process reads what the driver wrote to the output, and writes there itself.

    Raises:
        RunError: it does not; says where and what to do.
    """
    where = f"node {socket.gethostname()}"
    if not run_dir.probe_seen(probe, HIDDEN_S):
        raise RunError(
            f"{where} does not see what the driver wrote to {run_dir.url}, though it looked for {HIDDEN_S:.0f} s; "
            "give an --output that every node shares, such as a bucket"
        )
    try:
        run_dir.probe_write(f"{probe}-{os.getpid()}-{socket.gethostname()}")
    except (OSError, RunError) as error:
        raise RunError(f"{where} cannot write to {run_dir.url}: {error}") from error
