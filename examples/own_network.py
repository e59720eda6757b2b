"""Sample a network of your own.

Here it is the ideal denoiser of 64 pictures of discs, which needs no training. Any torch.nn.Module can take its place,
with the name of what it predicts ("eps", "v", "velocity", ...; docs/models.md lists the kinds).

    python examples/own_network.py        # writes runs/own-network/
"""

import torch
from torch import Tensor, nn

from ray_sampler import Model, RunConfig, run


def discs(number: int = 64, size: int = 32) -> Tensor:
    """(number, 3, size, size) float32 in [-1, 1]: a disc of one colour on black."""
    random = torch.Generator().manual_seed(0)
    centre = 8 + (size - 16) * torch.rand((number, 2, 1, 1), generator=random)
    radius = 3 + 4 * torch.rand((number, 1, 1), generator=random)
    colour = torch.rand((number, 3, 1, 1), generator=random)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = ((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2).sqrt()
    return 2 * colour * (radius - distance).clamp(0, 1)[:, None] - 1


class Ideal(nn.Module):
    """D(x, sigma): the mean of the data set's pictures, weighted by how likely each became x through noise of sigma."""

    data: Tensor

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.register_buffer("data", data)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        squares = torch.cdist(x.flatten(1), self.data.flatten(1)) ** 2
        weights = (-squares / (2 * sigma[:, None] ** 2)).softmax(dim=1)
        return (weights @ self.data.flatten(1)).view_as(x)


def main(num_samples: int = 256) -> str:
    """Returns the archive's path."""
    model = Model(Ideal(discs()), "denoiser", shape=(3, 32, 32))
    result = run(RunConfig(model=model, sampler="heun", steps=12, num_samples=num_samples, output="runs/own-network"))
    print(result.archive)
    return result.archive


if __name__ == "__main__":
    main()
