"""The cases of the GPU benchmark, each in a separate process: gpu_cases.py CASE [--json FILE].

Weights are random. With GPU_REHEARSAL=1 and no GPU every case runs on the CPU with tiny networks, to prove the code.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpu_graph import rate as block_rate
from gpu_graph import whole_block
from ray_sampler.networks.family import Precision
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.memory import OutOfDeviceMemoryError
from ray_sampler.sampling.numerics import compiles, numerics_key, pin
from ray_sampler.sampling.options import Compile
from ray_sampler.sampling.plan import MAIN, SamplePlan
from table import Goal, Row, Values, in_turn, parser, report
from tests.gpu.networks import options_of, plan_of, random_network
from textbook import Textbook, sample

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REPEATS = 3 if CUDA else 1
PROFILED_KERNELS = 15
Found = tuple[list[Row], list[str]]


class Subject(NamedTuple):
    """A network and how it is run."""

    name: str
    batch: int
    """Ours."""
    batches: tuple[int, ...]
    """Those that the textbook loop may choose from."""
    steps: int
    """Of heun."""
    precision: Precision = "fp16"


SUBJECTS = {
    "imagenet64": Subject("imagenet64", 64, (32, 64, 128), 18),
    "lsun256": Subject("lsun256", 16, (8, 16), 4),
    "digits": Subject("digits", 256, (256,), 18),
}


def release(device: torch.device) -> None:
    """Give back what torch keeps for later on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def subject(name: str) -> Subject:
    return SUBJECTS[name] if CUDA else Subject("tiny", 2, (2,), 2, "fp32")


def engine_of(network: nn.Module, of: Subject, compile: Compile, batch: int | None = None) -> Engine:
    if compile == "auto" and not CUDA:  # which compiles nothing on a CPU: this proves the rest of the way
        network = torch.compile(network, backend="aot_eager", dynamic=False)  # type: ignore[assignment]
    return Engine({MAIN: network}, batch_size=batch or of.batch, device=DEVICE, compile=compile)


def network_of(of: Subject, compile: Compile) -> nn.Module:
    return random_network(options_of(of.name), of.precision, DEVICE, contiguous=not compiles(compile, CUDA))


def plan(of: Subject, **flags: Any) -> SamplePlan:
    return plan_of(options_of(of.name), num_samples=2**20, **{"s_churn": 0.0, "steps": of.steps} | flags)


def rate(engine: Engine, plan: SamplePlan, batches: int) -> Callable[[], float]:
    """A function that gives images a second, after a first go that compiles, chooses kernels and takes memory."""
    count = batches * engine.batch_size

    def images_per_second() -> float:
        began = time.perf_counter()
        engine.sample(plan, 0, count)()
        return count / (time.perf_counter() - began)

    engine.sample(plan, 0, engine.batch_size)()
    return images_per_second


def textbook(of: Subject) -> Values:
    """Images a second of the textbook loop, with the batch that it is fastest with."""
    options = options_of(of.name)
    network = Textbook(random_network(options, of.precision, DEVICE))  # type: ignore[arg-type]  # a UNet

    def rate(batch: int, steps: int) -> float:
        labels = torch.arange(batch, device=DEVICE) % options.num_classes if options.class_cond else None
        began = time.perf_counter()
        sample(network, labels, range(batch), options.image_size, steps, DEVICE)
        return batch / (time.perf_counter() - began)

    found = {}
    for batch in of.batches:
        with suppress(torch.OutOfMemoryError):
            found[batch] = [rate(batch, 2) for _ in range(2)][-1]  # the first takes memory and kernels
    best = max(found, key=lambda batch: found[batch])
    return tuple(rate(best, of.steps) for _ in range(REPEATS))


def flops(of: Subject) -> int:
    """Floating-point operations of one evaluation for one image, counted as its matrix products and convolutions."""
    options = options_of(of.name)
    network = Textbook(random_network(options, of.precision, DEVICE))  # type: ignore[arg-type]  # a UNet
    x = torch.zeros(1, 3, options.image_size, options.image_size, device=DEVICE)
    labels = torch.zeros(1, dtype=torch.long, device=DEVICE) if options.class_cond else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, torch.ones(1, device=DEVICE), labels)
    return int(counter.get_total_flops())


def matmul_ceiling(precision: Precision) -> float:
    """Floating-point operations a second of one large square matrix product, summed up in float32."""
    size = 8192 if CUDA else 256
    dtype = torch.float16 if precision == "fp16" else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    products = 10

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(products):
            c = a @ b
        c[0, 0].item()
        return (time.perf_counter() - began) / products

    seconds()
    return 2 * size**3 / median(seconds() for _ in range(5))


def pinned(compile: Compile) -> None:
    """What an actor does before it computes."""
    torch.compiler.reset()
    pin(DEVICE, compile)


def idle_share(engine: Engine, plan: SamplePlan, shards: int) -> float:
    """Percent of the time that the device has nothing to do, with two shards in flight as an actor has them."""
    size, pending, found = 2 * engine.batch_size, [], []
    for shard in range(shards):
        pending.append(engine.sample(plan, shard * size, (shard + 1) * size))
        if len(pending) == 2:
            found.append(pending.pop(0)())
    found += [finish() for finish in pending]
    idle, busy = (sum(getattr(pictures, name) for pictures in found[1:]) for name in ("idle_s", "seconds"))
    return float(100 * idle / (idle + busy))


def kernels(engine: Engine, plan: SamplePlan) -> list[str]:
    """Where a batch's time goes: the kernels that take the most, with their share."""
    activity = torch.profiler.ProfilerActivity
    watched = [activity.CPU, activity.CUDA] if CUDA else [activity.CPU]
    with torch.profiler.profile(activities=watched) as profile:
        engine.sample(plan, 0, engine.batch_size)()
    field = "self_device_time_total" if CUDA else "self_cpu_time_total"
    kind = "CUDA" if CUDA else "CPU"  # the time of a kernel is that of what is around it too, and counts once
    times = {
        each.key: float(getattr(each, field))
        for each in profile.key_averages()
        if each.device_type.name == kind and not each.is_user_annotation
    }
    total = sum(times.values()) or 1.0
    top = sorted(times, key=lambda key: -times[key])[:PROFILED_KERNELS]
    return [f"profile: {100 * times[key] / total:.1f}% {key[:90]}" for key in top if times[key] > 0]


def published(name: str) -> Found:
    """A published network: compiled and pinned, against the textbook loop as people run it, and the card's ceiling."""
    of = subject(name)
    options = options_of(of.name)
    pinned("auto")  # first, as cuBLAS takes its workspace once
    ceiling, work = matmul_ceiling(of.precision), flops(of)
    engine = engine_of(network_of(of, "auto"), of, "auto")
    long, short = plan(of), plan(of, sampler="onestep")
    began = time.perf_counter()
    engine.warm_up(short)
    compile_s = time.perf_counter() - began
    ours, one_step = in_turn(REPEATS, rate(engine, long, 2), rate(engine, short, 16 if CUDA else 2))
    idle, profile = idle_share(engine, plan(of, steps=4), 6), kernels(engine, short)
    unpin()
    release(DEVICE)
    theirs = textbook(of)
    evaluations = long.evaluations()
    share = tuple(100 * each * work * evaluations / ceiling for each in ours)
    title = f"{name} ({options.image_size} pixels), {of.precision}, batch {of.batch}"
    rows = [
        Row(f"{title}: heun {of.steps} steps", ours, theirs, "images/s", Goal("at least", 3)),
        Row(f"{title}: share of the matmul ceiling", share, (), "%", Goal("at least", 45, "ours")),
        Row(f"{title}: heun {of.steps} steps", tuple(3600 * each for each in ours), (), "images/GPU-hour"),
        Row(f"{title}: one step", one_step, (), "images/s"),
        Row(f"{title}: the device is idle", (idle,), (), "%", Goal("at most", 1, "ours")),
        Row(f"{title}: first batch, with compiling or its cache", (compile_s,), (), "s"),
    ]
    notes = [f"{name}: {work / 1e9:.4g} GFLOP an image and evaluation; the ceiling is {ceiling / 1e12:.4g} TFLOP/s."]
    return rows, notes + profile


def imagenet64() -> Found:
    """The 296M-parameter network of ImageNet at 64 pixels."""
    return published("imagenet64")


def lsun256() -> Found:
    """The 526M-parameter network of LSUN at 256 pixels."""
    return published("lsun256")


def price() -> Found:
    """What determinism costs: pinned, against torch as it comes but for TF32 and cuBLAS's workspace."""
    of = subject("imagenet64")
    short = plan(of, sampler="onestep")
    batches = 16 if CUDA else 2
    rows = []
    modes: tuple[Compile, ...] = ("off", "auto")
    for mode in modes:
        network = network_of(of, mode)
        pinned(mode)
        fixed = rate(engine_of(network, of, mode), short, batches)
        ours = tuple(fixed() for _ in range(REPEATS))
        unpin()
        torch.compiler.reset()
        free = rate(engine_of(network, of, mode), short, batches)
        theirs = tuple(free() for _ in range(REPEATS))
        how = "compiled" if mode == "auto" else "not compiled"
        goal = Goal("at least", 0.9)
        rows.append(Row(f"determinism, {how}: pinned against as torch comes", ours, theirs, "images/s", goal))
        del network, free, fixed
        release(DEVICE)
    return rows, []


def unpin() -> None:
    """Undo for a comparison what `pin` does, but for TF32 and cuBLAS's workspace."""
    import torch._inductor.config as inductor

    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # a module property
    torch.backends.cudnn.deterministic = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    for name, value in {
        "deterministic": False,
        "dynamic_scale_rblock": True,
        "shape_padding": True,
        "benchmark_epilogue_fusion": True,
    }.items():
        if hasattr(inductor, name):
            setattr(inductor, name, value)


def layouts() -> Found:
    """Not compiled: contiguous, as actors have it then, against channels last."""
    of = subject("imagenet64")
    pinned("off")
    short = plan(of, sampler="onestep")
    engines = [
        engine_of(random_network(options_of(of.name), of.precision, DEVICE, contiguous), of, "off")
        for contiguous in (True, False)
    ]
    ours, theirs = in_turn(REPEATS, *(rate(engine, short, 8 if CUDA else 2) for engine in engines))
    goal = Goal("at least", 1)
    return [Row("not compiled: contiguous against channels last", ours, theirs, "images/s", goal)], []


def batches() -> Found:
    """Not compiled: doubled batches up to the one that does not fit."""
    of = subject("imagenet64")
    pinned("off")
    network, short = network_of(of, "off"), plan(of, sampler="onestep")
    rows, notes = [], []
    size, largest = 16 if CUDA else 2, 8192 if CUDA else 8
    while size <= largest:
        try:
            measure = rate(engine_of(network, of, "off", size), short, 2)
            rows.append(Row(f"not compiled, one step, batch {size}", (measure(),), (), "images/s"))
            if CUDA:
                notes.append(f"Batch {size} takes {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB.")
        except OutOfDeviceMemoryError as error:
            notes.append(f"Batch {size}: {error}.")
            break
        size *= 2
        release(DEVICE)
    return rows, notes


def small() -> Found:
    """The bundled network's architecture, whose kernels are short: what compiling and CUDA graphs win."""
    of = subject("digits")
    long = plan(of)
    pinned("auto")
    network, plain = network_of(of, "auto"), network_of(of, "off")
    engine = engine_of(plain, of, "off")
    sides = {"not compiled": rate(engine, long, 2), "compiled": rate(engine_of(network, of, "auto"), long, 2)}
    try:
        whole = whole_block(plain, long, of.batch, DEVICE)
        equal = whole(1).numpy().tobytes() == engine.sample(long, of.batch, 2 * of.batch)().columns["image"].tobytes()
        notes = [f"The whole loop as one CUDA graph gives {'equal' if equal else 'OTHER'} bytes."]
        sides["not compiled, the whole loop one CUDA graph"] = block_rate(whole, of.batch, 2)
    except RuntimeError as error:
        notes = [f"The whole loop cannot be captured as one CUDA graph: {error}."]
    if CUDA:
        graphs: Any = torch.compile(network, mode="reduce-overhead", dynamic=False)
        sides["compiled, with CUDA graphs"] = rate(engine_of(graphs, of, "off"), long, 2)
    rates = in_turn(REPEATS, *sides.values())
    title = f"digits, heun {of.steps} steps, {of.precision}, batch {of.batch}"
    rows = [Row(f"{title}: {side}", found, (), "images/s") for side, found in zip(sides, rates, strict=True)]
    return rows, notes


def job() -> Found:
    """A whole run through Ray: how long the device has nothing to do between shards, and how fast the run is."""
    from ray_sampler import RunConfig, run

    with tempfile.TemporaryDirectory() as folder:
        result = run(
            RunConfig(
                model="digits-v1",
                output=str(Path(folder) / "run"),
                num_samples=16384 if CUDA else 16,
                batch_size=512 if CUDA else 2,
                shard_size=1024 if CUDA else 4,
                steps=18 if CUDA else 2,
                gpus_per_actor=1.0 if CUDA else 0.0,
                max_actors=1,
                compile="off",
                progress="none",
            )
        )
    seconds, summary = result.summary["seconds"], result.summary
    rows = [Row("a whole run of digits, while sampling", (summary["samples_per_second"],), (), "images/s")]
    if "gpu_idle" in seconds:
        idle = 100 * seconds["gpu_idle"] / (seconds["gpu_idle"] + seconds["gpu_computing"])
        rows.append(Row("a whole run of digits: the device is idle", (idle,), (), "%", Goal("at most", 1, "ours")))
    return rows, [f"Seconds of the run: {seconds}."]


def ahead() -> Found:
    """Compile what later cases need, so that they find it in Inductor's cache; says how long that takes."""
    rows = []
    for name in os.environ.get("GPU_AHEAD", "imagenet64,lsun256").split(","):
        network_name, _, free = name.partition(":")
        of = subject(network_name)
        torch.compiler.reset()
        if not free:
            pinned("auto")
        began = time.perf_counter()
        engine_of(network_of(of, "auto"), of, "auto").warm_up(plan(of, sampler="onestep"))
        rows.append(Row(f"{name}: compiling, cold, beside other work", (time.perf_counter() - began,), (), "s"))
        release(DEVICE)
    return rows, []


def facts() -> Found:
    """What computes here."""
    pinned("auto")
    notes = [
        f"Key: {numerics_key(DEVICE, 64, 'fp16', 'auto')}.",
        f"Python {platform.python_version()}, {os.cpu_count()} CPU cores.",
    ]
    if CUDA:
        properties = torch.cuda.get_device_properties(DEVICE)
        notes.append(f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors.")
    return [Row("matmul ceiling, fp16 summed in fp32", (matmul_ceiling("fp16") / 1e12,), (), "TFLOP/s")], notes


CASES: dict[str, Callable[[], Found]] = {
    case.__name__: case for case in (facts, ahead, imagenet64, price, layouts, batches, small, job, lsun256)
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("case", choices=CASES)
    arguments = made.parse_args()
    if not CUDA and os.environ.get("GPU_REHEARSAL") != "1":
        raise SystemExit("torch finds no GPU; GPU_REHEARSAL=1 runs the code on the CPU, with tiny networks")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than going on without compiling
    report(*CASES[arguments.case](), arguments.json)


if __name__ == "__main__":
    main()
