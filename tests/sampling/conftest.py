"""What the tests of sampling share: an independent Philox, the golden numbers, and one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.networks.golden import golden_folder

Words = tuple[int, int, int, int]
ReferencePhilox = Callable[[Words, int], Words]


def philox4x32_10(counter: Words, key: int) -> Words:
    """Philox4x32-10 as its paper states it, in unbounded Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key % 2**32, key // 2**32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.fixture(scope="session")
def reference_philox() -> ReferencePhilox:
    return philox4x32_10


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers computed with the original implementation."""
    return golden_folder()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
