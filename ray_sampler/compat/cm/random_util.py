"""The generators of the consistency-models repository, whose streams continue from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ray_sampler.errors import require

Device = torch.device | str


class NoiseSource(Protocol):
    """Where `karras_sample` draws its normals, one call for each draw."""

    def randn(self, *size: int, device: Device) -> Tensor:
        """Normals of a size, on a device."""

    def randn_like(self, tensor: Tensor) -> Tensor:
        """Normals of the shape, dtype and device of a tensor."""


class GlobalGenerator:
    """dummy: torch's global generator."""

    randn: Callable[..., Tensor] = staticmethod(torch.randn)
    randn_like: Callable[..., Tensor] = staticmethod(torch.randn_like)
    randint: Callable[..., Tensor] = staticmethod(torch.randint)


class SeededGenerator:
    """Streams whose rows belong to samples: row j of a call is sample done_samples + j, the last one at most.

    Streams continue from call to call, separately on each device. Where torch.distributed runs, row j of
    rank r is sample done_samples + r + j * ranks.
    """

    def __init__(self, num_samples: int, seed: int = 0, *, individual: bool) -> None:
        require(num_samples >= 1, f"num_samples is {num_samples}; this generator needs at least 1")
        self.num_samples = num_samples
        self.done_samples = 0
        self.seed = seed
        self.individual = individual
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if running else 0
        self.world_size = torch.distributed.get_world_size() if running else 1
        self.set_seed(seed)

    def set_seed(self, seed: int) -> None:
        """Begin all streams anew, from `seed`; `get_seed` still gives the first one."""
        self._stream_seed = seed
        self._streams: dict[tuple[torch.device, int], torch.Generator] = {}

    def get_seed(self) -> int:
        """The first seed."""
        return self.seed

    def set_done_samples(self, done_samples: int) -> None:
        """Move row 0 to the sample `done_samples`; determ, whose stream is one, begins it anew."""
        self.done_samples = done_samples
        if not self.individual:
            self.set_seed(self.seed)

    def randn(self, *size: int, dtype: torch.dtype = torch.float, device: Device = "cpu") -> Tensor:
        """Normals of `size`, (rows, ...), each row from its sample's stream."""
        return self._rows(size, device, lambda s, g: torch.randn(s, generator=g, dtype=dtype, device=g.device))

    def randn_like(self, tensor: Tensor) -> Tensor:
        """Normals of the shape, dtype and device of a tensor."""
        return self.randn(*tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: torch.dtype = torch.long, device: Device = "cpu"
    ) -> Tensor:
        """Whole numbers from `low` to `high` - 1 of `size`, (rows, ...), each row from its sample's stream."""
        return self._rows(
            size, device, lambda s, g: torch.randint(low, high, s, generator=g, dtype=dtype, device=g.device)
        )

    def _rows(
        self, size: tuple[int, ...], device: Device, draw: Callable[[tuple[int, ...], torch.Generator], Tensor]
    ) -> Tensor:
        samples = self.done_samples + self.rank + self.world_size * torch.arange(size[0])
        samples = samples.clamp(0, self.num_samples - 1)
        if not self.individual:
            return draw((self.num_samples, *size[1:]), self._stream(device, 0))[samples]
        return torch.cat([draw((1, *size[1:]), self._stream(device, i)) for i in samples.tolist()])

    def _stream(self, device: Device, i: int) -> torch.Generator:
        """The stream of sample i; of all samples for determ."""
        device = torch.empty(0, device=device).device  # cuda and cuda:0 are one
        if (device, i) not in self._streams:
            seed = i + self.num_samples * self._stream_seed if self.individual else self._stream_seed
            self._streams[device, i] = torch.Generator(device).manual_seed(seed)
        return self._streams[device, i]


def get_generator(generator: str, num_samples: int = 0, seed: int = 0) -> GlobalGenerator | SeededGenerator:
    """A source of noise: "dummy" (torch's global generator), "determ" (one stream: each call draws for all
    num_samples) or "determ-indiv" (one stream a sample, seeded i + num_samples * seed).

    Raises:
        RequestError: another name, or a seeded one without samples.
    """
    require(
        generator in ("dummy", "determ", "determ-indiv"),
        f"generator is {generator!r}; it must be one of dummy, determ, determ-indiv",
    )
    if generator == "dummy":
        return GlobalGenerator()
    return SeededGenerator(num_samples, seed, individual=generator == "determ-indiv")
