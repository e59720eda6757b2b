"""How long does the driver take from an EDM2-S snapshot to weights in the object store, and how much memory?

560 MB of float16 in NVIDIA's pickle: read, checked, hashed, and shipped tensor by tensor. The other side reads the file
once, front to back, and casts what it reads to float32. The last row is the network with its weight normalisation done
once at load, against at every call. Each repeat of a side is a separate process; Ray's start is
not counted. Memory is the driver's peak over the file's size, Ray and torch included, and shared memory that it wrote.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from table import Goal, Row, in_turn, parser, report

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 5
CHUNK_BYTES = 16 * 2**20
ARGUMENTS = {
    "img_resolution": 64,
    "img_channels": 4,
    "label_dim": 1000,
    "model_channels": 192,
    "use_fp16": True,
    "sigma_data": 0.5,
}
"""Of the published EDM2-S for ImageNet 512."""


def write_snapshot(file: Path) -> None:
    """A snapshot of EDM2-S's shapes with random weights, about 560 MB."""
    sys.path.insert(0, str(ROOT))
    from ray_sampler.networks.edm2 import Edm2UNet, options_from
    from ray_sampler.networks.family import without_memory
    from ray_sampler.networks.nvidia import SavedNetwork
    from tests.networks.nvidia_files import snapshot

    options = options_from(SavedNetwork("Precond", dict(ARGUMENTS), {}, 0))
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"unet.{name}": torch.randn(tensor.shape, generator=random).half()
        for name, tensor in without_memory(lambda: Edm2UNet(options)).state_dict().items()
    }
    file.write_bytes(snapshot("Precond", tensors, ARGUMENTS))


def ours(file: Path) -> dict[str, float]:
    """Seconds from the file to the object store, and the peak memory of this process in bytes."""
    import ray

    from ray_sampler.cluster.shipping import ship
    from ray_sampler.networks.opening import open_network

    ray.init(
        "local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=2 * 2**30,
    )
    began = time.perf_counter()
    network = open_network(str(file), {})
    opened = time.perf_counter() - began
    shipped = ship(network, "fp32")
    taken = time.perf_counter() - began
    del shipped
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    ray.shutdown()
    return {"seconds": taken, "opened": opened, "peak": peak}


def read_and_cast(file: Path) -> dict[str, float]:
    """Seconds of reading the file once, front to back, and casting what is read from float16 to float32."""
    began = time.perf_counter()
    cast = []
    with file.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            cast.append(torch.frombuffer(bytearray(chunk[: len(chunk) // 2 * 2]), dtype=torch.float16).float())
    return {"seconds": time.perf_counter() - began, "values": sum(part.numel() for part in cast)}


def forward(folded: bool) -> Callable[[], float]:
    """Seconds of one call of EDM2-S on one image, on one core, with its weights folded or normalised at each call."""
    sys.path.insert(0, str(ROOT))
    from ray_sampler.networks.edm2 import Edm2UNet, fold, options_from
    from ray_sampler.networks.nvidia import SavedNetwork

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Edm2UNet(options_from(SavedNetwork("Precond", dict(ARGUMENTS), {}, 0))).requires_grad_(False).eval()
    for tensor in network.state_dict().values():
        tensor.normal_()
    if folded:
        fold(network, torch.float32)
    x, time_, label = torch.randn(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, dtype=torch.int64)

    def measure() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            network(x, time_, label)
        return time.perf_counter() - began

    return measure


def in_process(side: str, file: Path) -> dict[str, float]:
    """The answer of a side, in a new process."""
    command = [sys.executable, __file__, "--side", side, "--file", str(file)]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--side", choices=("ours", "read_and_cast"))
    options.add_argument("--file", type=Path)
    arguments = options.parse_args()
    if arguments.side:
        torch.set_num_threads(1)
        print(json.dumps({"ours": ours, "read_and_cast": read_and_cast}[arguments.side](arguments.file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "edm2-s.pkl"
        write_snapshot(file)
        size = file.stat().st_size
        answers: list[dict[str, float]] = []

        def one_of_ours() -> float:
            answers.append(in_process("ours", file))
            return answers[-1]["seconds"]

        mine, plain = in_turn(REPEATS, one_of_ours, lambda: in_process("read_and_cast", file)["seconds"])
    folded, unfolded = in_turn(REPEATS, forward(True), forward(False))
    peaks = tuple(answer["peak"] / size for answer in answers)
    rows = [
        Row(f"snapshot: {size / 1e6:.0f} MB, file to object store", mine, plain, "s", Goal("at most", 3.0)),
        Row("snapshot: the driver's peak memory", peaks, (1.0,) * len(peaks), "files", Goal("at most", 2.5)),
        Row("snapshot: a forward pass, folded once or at each call", folded, unfolded, "s", Goal("at most", 1.0)),
    ]
    opened = sorted(answer["opened"] for answer in answers)[len(answers) // 2]
    notes = [f"Of the seconds to the object store, {opened:.1f} s are reading, checking and hashing."]
    report(rows, notes, arguments.json)


if __name__ == "__main__":
    main()
