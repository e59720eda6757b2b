"""How soon is a new actor ready for its first batch, and how often does a node hold the weights by then?

Eight new actors on one node and a checkpoint of about 600 MB: ours map the one copy that the node's object store
holds; the others read the file each, into a network built as usual. Timed from torch imported to all being ready.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from engine import architecture, network_of, random_weights
from ray_sampler.cluster.shipping import Shipped, load, ship, unpack
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.published import IMAGENET64
from table import Goal, Row, in_turn, parser, report

ACTORS, REPEATS = 8, 3
ARCH = architecture(IMAGENET64 | {"num_channels": 128, "num_res_blocks": 4})


def own_bytes() -> int:
    """Memory of this process that no other one shares."""
    return int(psutil.Process().memory_full_info().uss)


class NewActor:
    """What an actor does before its first batch, apart from sampling."""

    def imported(self) -> str:
        return torch.__version__

    def map(self, shipped: Shipped) -> int:
        """Bytes that the weights take in this actor, read through once."""
        before = own_bytes()
        network = unpack(shipped)
        for tensor in network.state_dict().values():
            tensor.sum()
        return own_bytes() - before

    def read(self, file: str) -> int:
        before = own_bytes()
        weights = torch.load(file, map_location="cpu", weights_only=True)
        for tensor in weights.values():
            tensor.sum()
        return own_bytes() - before

    def build_from_store(self, shipped: Shipped) -> None:
        self.network = load(shipped, torch.device("cpu"))

    def build_from_file(self, arch: AdmOptions, file: str) -> None:
        network = UNet(arch)
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.network = network.eval()


def of_new_actors(method: str, *arguments: Any) -> tuple[float, list[Any]]:
    """Seconds until all of eight new actors have answered, once torch is imported in each; and the answers."""
    actors: list[Any] = [ray.remote(NewActor).options(num_cpus=0).remote() for _ in range(ACTORS)]
    ray.get([actor.imported.remote() for actor in actors])
    began = time.perf_counter()
    answers = ray.get([getattr(actor, method).remote(*arguments) for actor in actors])
    taken = time.perf_counter() - began
    for actor in actors:
        ray.kill(actor)
    return taken, answers


def main() -> None:
    arguments = parser(__doc__).parse_args()
    state = random_weights(ARCH)
    size = sum(tensor.nbytes for tensor in state.values())
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "weights.pt")
        torch.save(state, file)
        ray.init(
            "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=2 * 2**30,
        )
        began = time.perf_counter()
        shipped = ship(network_of(ARCH, state), "fp32")
        put_s = time.perf_counter() - began
        del state
        ours, theirs = in_turn(
            REPEATS,
            lambda: of_new_actors("build_from_store", shipped)[0],
            lambda: of_new_actors("build_from_file", ARCH, file)[0],
        )
        mapped, read = of_new_actors("map", shipped)[1], of_new_actors("read", file)[1]
        ray.shutdown()
    copies, copies_read = 1 + sum(mapped) / size, sum(read) / size
    subject = f"{size / 1e6:.0f} MB, {ACTORS} new actors"
    rows = [
        Row(f"weights: {subject}, until the last is ready", ours, theirs, "s", Goal("at most", 0.5)),
        Row(f"weights: {subject}, before upload", (copies,), (copies_read,), "copies", Goal("at most", 1.1, "ours")),
    ]
    report(rows, [f"The driver puts the weights into the object store once a run, in {put_s:.1f} s."], arguments.json)


if __name__ == "__main__":
    main()
