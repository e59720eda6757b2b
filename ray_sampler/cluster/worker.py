"""An actor: the networks that it holds, on one device, and the tasks of several runs that it carries out."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from torch import nn

from ray_sampler.cluster import shipping
from ray_sampler.cluster.heard import Heard
from ray_sampler.cluster.metrics import ActorMetrics
from ray_sampler.cluster.shipping import Shipped
from ray_sampler.errors import RunError
from ray_sampler.networks.family import Precision
from ray_sampler.sampling.engine import Engine, Pictures, why_not_compiled
from ray_sampler.sampling.finish import UNDECODED, Product, checked, derive
from ray_sampler.sampling.memory import OutOfDeviceMemoryError, ran_out_of_memory, take_share
from ray_sampler.sampling.numerics import numerics_key, pin
from ray_sampler.sampling.options import Compile
from ray_sampler.sampling.plan import Kept, SamplePlan
from ray_sampler.sampling.trial import try_networks
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.pictures import Pictures as StoredPictures
from ray_sampler.storage.record import DamagedFragment, FragmentFormat, FragmentName, Record, Samples
from ray_sampler.storage.retry import HIDDEN_S
from ray_sampler.storage.run_dir import FRAGMENTS, RunDir

CONCURRENCY = 10
"""Calls that an actor takes at once: shards in flight, at most eight, and questions beside them."""


IMAGES = "images"
"""The product that every run has: its pictures, in fragments."""


class Task(NamedTuple):
    """One call of an actor: which run, which samples [start, stop), and what of them."""

    run: int
    """Its place among the runs that share the pool."""
    start: int
    stop: int
    product: str = IMAGES


@dataclass(frozen=True)
class Loaded:
    """What an actor is: the networks that it holds, and how it computes."""

    networks: Mapping[str, Shipped]
    """By role."""
    precision: Precision
    batch_size: int
    compile: Compile
    cores: int
    """CPU cores of an actor without a GPU."""
    gpus: float = 0.0
    """GPUs of an actor: at most one, or a share of one."""
    tried: bool = True
    """Whether the driver has tried the user's networks among them, if there are any."""


@dataclass(frozen=True)
class RunSpec:
    """What a call is about: one run."""

    output: str
    """Absolute path or URL of the run directory."""
    fingerprint: str
    plan: SamplePlan | None
    """None where nothing is sampled."""
    fragment_format: FragmentFormat = "parquet"
    probe: str = ""
    """Name of the file by which the driver shows that it writes to the same place."""
    products: Mapping[str, Product] = field(default_factory=dict)
    """What is made of the samples beside their fragments, by name."""
    pictures: StoredPictures | None = None
    """What products are made of where that is not the run's fragments."""
    source: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the source of the user's modules, by file."""
    latents: str | None = None
    """Directory of a run whose latents are decoded in place of sampling."""


@dataclass(frozen=True)
class WorkerInfo:
    """Where an actor runs."""

    node_id: str
    pid: int
    device: str
    numerics_key: str
    said: tuple[str, ...] = ()
    """Lines that it printed, each different one once."""


@dataclass(frozen=True)
class TaskResult:
    """What comes back of a task: no images."""

    name: FragmentName
    """Of the fragment, or of the other product's range."""
    record: Record | None
    """Of the fragment; None for another product."""
    compute_s: float
    wait_s: float
    """Time the device had nothing to do before this task, from the end of the one before."""
    upload_s: float
    """Encoding and writing."""
    said: tuple[str, ...] = ()
    """Lines that the actor printed since the last call, each different one once."""


class HiddenError(RunError):
    """A process does not see, at first sight, what the driver wrote to an output: a cache may hide it for a while."""


class Worker:
    """Samples shards and writes their fragments. All computing happens on one dedicated thread."""

    streams: tuple[Heard, ...] = ()
    """Where a user's code prints."""

    def __init__(self, loaded: Loaded, runs: Sequence[RunSpec]) -> None:
        self.loaded = loaded
        self.runs = runs
        self.run_dirs = [RunDir(run.output) for run in runs]
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self.compute = ThreadPoolExecutor(1, thread_name_prefix="compute")
        if any(shipped.own for shipped in loaded.networks.values()):
            self.streams = sys.stdout, sys.stderr = Heard(sys.stdout), Heard(sys.stderr)

    def start(self, patience_s: float = 0.0) -> WorkerInfo:
        """Prove access to the outputs and load the networks; before anything else, and again after HiddenError.

        Args:
            patience_s: seconds for which it looks for what the driver wrote.

        Raises:
            HiddenError: it looked at once and only once, and did not see that.
            RunError: this node does not share an output, or cannot compile, or its torch cannot use its GPU.
            OutOfDeviceMemoryError: the networks, or a batch, do not fit on the device.
            WrongNetworkError: a user's network cannot be sampled.
        """
        for run, run_dir in zip(self.runs, self.run_dirs, strict=True):
            prove_access(run_dir, run.probe, patience_s)
        with self._noting():
            self.engine = self.compute.submit(self._build).result()
        self.metrics = [ActorMetrics(run.fingerprint[:8]) for run in self.runs]
        return replace(self.info(), said=self._said())

    def _said(self) -> tuple[str, ...]:
        """Lines that were printed since the last call, each different one once."""
        return tuple(line for stream in self.streams for line in stream.take())

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note on an error what was printed before it."""
        try:
            yield
        except Exception as error:
            for line in self._said():
                error.add_note(line)
            raise

    def _build(self) -> Engine:
        loaded = self.loaded
        pin(self.device, loaded.compile)  # before anything touches a GPU
        prove_gpu(self.device)
        take_share(self.device, loaded.gpus)
        self.networks = self._load()
        plan = self.runs[0].plan
        if plan and not loaded.tried:
            for warning in try_networks(self.networks, plan, loaded.batch_size):
                print(warning)
        engine = Engine(
            self.networks,
            batch_size=loaded.batch_size,
            device=self.device,
            compile=loaded.compile,
            cores=loaded.cores,
        )
        try:
            if plan:
                engine.warm_up(plan)
        except Exception as error:
            if (why := why_not_compiled(error)) is None:
                raise
            raise RunError(
                f"node {socket.gethostname()} cannot compile the network ({why}); give --compile off, or install there "
                "what is missing"
            ) from error
        return engine

    def _load(self) -> dict[str, nn.Module]:
        try:
            return {role: shipping.load(network, self.device) for role, network in self.loaded.networks.items()}
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
        raise OutOfDeviceMemoryError(
            f"the network's weights do not fit in the memory of {self.device}; try --precision fp16 if this is fp32, "
            "fewer actors on a GPU (a larger --gpus_per_actor), or a device with more memory"
        )

    def info(self) -> WorkerInfo:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        loaded = self.loaded
        key = numerics_key(self.device, loaded.batch_size, loaded.precision, loaded.compile)
        return WorkerInfo(ray.get_runtime_context().get_node_id(), os.getpid(), name, key)

    def evaluations(self) -> int:
        """Network calls so far: a number that rises shows that a slow shard is being computed."""
        return self.engine.evaluations

    def work(self, packed: list[Any]) -> TaskResult:
        """Carry out a task: compute its samples and write their fragment, or make another product of them.

        Args:
            packed: the fields of the `Task`, as a list: Ray sends that in half the time of four arguments, and
                without pickle.

        Raises:
            NonFiniteError, OutOfDeviceMemoryError: from the engine.
            RunError: the result cannot be written.
        """
        task = Task(*packed)
        product = self.runs[task.run].products.get(task.product)
        with self._noting():
            derived = product and product.takes == "image"
            result = self._derive(task, product) if product and derived else self._sample(task)
        return replace(result, said=self._said())

    def _sample(self, task: Task) -> TaskResult:
        """Sample a range, for its fragment and all products, or for a product that only needs the solver again."""
        run, start, stop, wanted = task
        spec = self.runs[run]
        assert spec.plan is not None
        products = [product for product in spec.products.values() if wanted in (IMAGES, product.name)]
        of_x = {product.name: product.finish for product in products if product.takes == "x"}
        # On a GPU the compute thread only queues a shard; it is awaited here, while the next one is queued.
        # Where the pictures are there already, nothing is decoded.
        plan = spec.plan if wanted == IMAGES else replace(spec.plan, finisher=UNDECODED)
        if spec.latents is not None:
            plan = replace(plan, kept=kept_of(spec.latents, start, stop))
        pictures: Pictures = self.compute.submit(self.engine.sample, plan, start, stop, of_x).result()()
        began = time.perf_counter()
        samples = Samples(start, pictures.columns)
        files: list[tuple[str, FragmentFormat, Samples]] = []
        for product in products:
            of_it = pictures.products.get(product.name)
            made = self._made_of(product, start, samples.images) if of_it is None else checked(product, start, of_it)
            files.append((product.folder, "parquet", made))
        if wanted == IMAGES:  # a fragment comes last: where it is, its range of the products is, too
            files.append((FRAGMENTS, spec.fragment_format, samples))
        computed_by = self._computed_by(run, pictures.seconds)
        for folder, format, columns in files:
            name, record = self._write(run, columns, folder, format, computed_by)
        upload_s = time.perf_counter() - began
        self.metrics[run].count(stop - start, pictures.seconds, pictures.idle_s, upload_s)
        kept = record if wanted == IMAGES else None
        return TaskResult(name, kept, pictures.seconds, pictures.idle_s, upload_s)

    def _derive(self, task: Task, product: Product) -> TaskResult:
        """Make a product of pictures that are stored."""
        run, start, stop, _ = task
        began = time.perf_counter()
        spec = self.runs[run]
        if spec.pictures:
            images = spec.pictures.read(start, stop).images
        else:
            images = self.run_dirs[run].ranges().read_samples(start, stop, spec.fingerprint).images
        made = self._made_of(product, start, images)
        computed_by = self._computed_by(run, time.perf_counter() - began)
        written, _ = self._write(run, made, product.folder, "parquet", computed_by)
        return TaskResult(written, None, 0.0, 0.0, time.perf_counter() - began)

    def _made_of(self, product: Product, start: int, images: np.ndarray) -> Samples:
        arguments = (product, images, start, self.networks, self.device, self.engine.workers)
        return self.compute.submit(derive, *arguments).result()

    def _write(
        self, run: int, samples: Samples, folder: str, format: FragmentFormat, computed_by: Mapping[str, Any]
    ) -> tuple[FragmentName, Record]:
        data, record = encode(samples, self.runs[run].fingerprint, computed_by, format)
        name = FragmentName(samples.start, samples.stop, format)
        self.run_dirs[run].ranges(folder).write(name, data)
        return name, record

    def _computed_by(self, run: int, seconds: float) -> dict[str, Any]:
        info, source = self.info(), dict(self.runs[run].source)
        plan = self.runs[run].plan
        finished = f", {plan.finisher.numerics}" if plan and plan.finisher.numerics else ""
        made = {
            "numerics_key": info.numerics_key + finished,
            "device": info.device,
            "host": socket.gethostname(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "seconds": round(seconds, 3),
        }
        return made | ({"source": source} if source else {})


def kept_of(url: str, start: int, stop: int) -> Kept:
    """The latents of the samples [start, stop) that a run kept.

    Raises:
        RunError: they are not there, or damaged.
    """
    where = (run_dir := RunDir(url)).kept_latents()
    if where is None:
        raise RunError(f"{run_dir.url}, which --latents names, keeps no latents any more")
    ranges, column = where
    try:
        x = ranges.read_samples(start, stop, None).columns[column]
    except DamagedFragment as error:
        raise RunError(f"the latents in {run_dir.url} are damaged: {error}; run that run's command again") from error
    return Kept(start, torch.from_numpy(x if column == "latent" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))))


def prove_gpu(device: torch.device) -> None:
    """Check that torch can use the GPU that Ray gave this process.

    Raises:
        RunError: it cannot; says where, why and what to do.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # the first where torch was built for CPUs
        raise RunError(
            f"node {socket.gethostname()} has a GPU, but torch {torch.__version__} cannot use it there "
            f"({str(error).strip().partition(chr(10))[0]}); install a torch for that GPU and its driver, or give "
            "--gpus_per_actor 0"
        ) from error


def prove_access(run_dir: RunDir, probe: str, patience_s: float) -> None:
    """Check that this process reads what the driver wrote to the output, and writes there itself.

    Raises:
        HiddenError: it does not see it yet, and was to look only once.
        RunError: it does not; says where and what to do.
    """
    where = f"node {socket.gethostname()}"
    if not run_dir.probe_seen(probe, patience_s):
        if not patience_s:
            raise HiddenError(
                f"{where} does not see yet what the driver wrote to {run_dir.url}; it looks again for up to "
                f"{HIDDEN_S:.0f} s, as a cache may hide it"
            )
        raise RunError(
            f"{where} does not see what the driver wrote to {run_dir.url}, though it looked for {patience_s:.0f} s; "
            "give an --output that every node shares, such as a bucket"
        )
    try:
        run_dir.probe_write(f"{probe}-{os.getpid()}-{socket.gethostname()}")
    except (OSError, RunError) as error:
        raise RunError(f"{where} cannot write to {run_dir.url}: {error}") from error
