"""Train the bundled digits model: a class-conditional EDM UNet on 4,500 real digits, in three cycles.

The first made the teacher of `digits-cd`, the second `digits-v1`, the third `digits`. After an interruption, the same
command continues from the last checkpoint.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import load_digits
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.parameterisation import edm_scalings, parameterise
from recipe import recipe_of

ARCHITECTURE = AdmOptions(
    image_size=32,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2,2",
    attention_resolutions="8",
    num_head_channels=32,
    resblock_updown=True,
    use_scale_shift_norm=True,
    class_cond=True,
    num_classes=10,
)
"""Without a null label."""


@dataclass(frozen=True)
class Cycle:
    """One warm-up and cosine decay of the learning rate."""

    images: int
    """Training images seen, repeats included."""
    lr: float
    """Peak learning rate of AdamW, after a linear warm-up of 200 steps, before the decay to 0."""
    p_mean: float
    p_std: float
    """Mean and deviation of ln sigma. The structure of a digit is decided at high noise."""
    ema: float = 0.998
    """Decay of the averaged weights, a step."""
    label_dropout: float = 0.0
    """Share of labels that are replaced by the null label."""
    augment: float = 0.0
    """Share of images that are turned, scaled and sheared a little, at the beginning; it falls linearly to 0."""


CYCLES = {
    1: Cycle(images=320_000, lr=2e-3, p_mean=-0.6, p_std=1.5),
    2: Cycle(images=140_000, lr=1e-3, p_mean=0.3, p_std=1.4),
    3: Cycle(images=560_000, lr=1e-3, p_mean=0.2, p_std=1.4, ema=0.999, label_dropout=0.1, augment=0.8),
}
"""By number."""


@dataclass(frozen=True)
class Recipe:
    out: Path = Path("runs/train-digits")
    """Folder of the checkpoint and of the finished weights."""
    cycles: str = "1,2,3"
    """Which are run, in this order."""
    start: Path = Path("")
    """Weights to begin with, which have the earlier cycles behind them; empty means new ones."""
    batch: int = 64
    seed: int = 0
    checkpoint_every: int = 250
    """Steps."""
    threads: int = 1


def edm_loss(network: UNet, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean of lambda(sigma) |D(y + n, sigma) - y|^2, lambda = 1 / c_out^2 (Karras et al. 2022, eq. 2 and table 1)."""
    denoise = parameterise("edm", c_noise="250log").denoiser(network, labels)
    noisy = images + sigma[:, None, None, None] * noise
    _, c_out, _ = edm_scalings(sigma)
    return ((denoise(noisy, sigma) - images) / c_out[:, None, None, None]).square().mean()


def moved(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`images` (B, 3, 32, 32), of which a `share` is turned by some 6 degrees, scaled by 5% and sheared by 5%."""
    count = len(images)
    turn, wide, high, shear = torch.randn((4, count), generator=generator) * torch.tensor(
        [[0.1], [0.05], [0.05], [0.05]]
    )
    wide, high = wide.exp(), high.exp()
    rows = (wide * turn.cos(), shear - turn.sin(), turn.sin(), high * turn.cos())
    still = torch.rand(count, generator=generator) >= share
    matrix = torch.stack(rows, dim=1).view(count, 2, 2)
    matrix[still] = torch.eye(2)
    matrix = torch.cat([matrix, torch.zeros(count, 2, 1)], dim=2)
    grid = F.affine_grid(matrix, [count, 1, 32, 32], align_corners=False)
    drawn = F.grid_sample(images[:, :1] + 1, grid, "bilinear", "zeros", align_corners=False) - 1
    return torch.where(still[:, None, None, None], images[:, :1], drawn).repeat(1, 3, 1, 1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())


def fitted(weights: dict[str, Tensor], network: UNet) -> dict[str, Tensor]:
    """Weights in float32; where the network has a null label and they have none, with a row of zeros for it."""
    weights = {name: weight.float() for name, weight in weights.items()}
    labels = weights["label_emb.weight"]
    if len(labels) < network.arch.num_labels:
        weights["label_emb.weight"] = torch.cat([labels, torch.zeros_like(labels[:1])])
    return weights


def channels_last(network: UNet) -> UNet:
    """Keep convolution weights in the layout that convolutions are fastest in; the values stay."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def descend(
    loss: Tensor,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    averaged: dict[str, Tensor],
    decay: float,
) -> None:
    """One step down the loss, its gradient's norm clipped to 1; `averaged` moves towards the new weights."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        for name, weight in network.state_dict().items():
            averaged[name].lerp_(weight, 1 - decay)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(recipe: Recipe) -> None:
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    data, _ = load_digits()
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    chosen = [CYCLES[int(number)] for number in recipe.cycles.split(",")]
    label_dropout = max(cycle.label_dropout for cycle in chosen)
    network = channels_last(UNet(replace(ARCHITECTURE, label_dropout=label_dropout)))
    if recipe.start.name:
        network.load_state_dict(fitted(load_file(recipe.start), network))
    generator = torch.Generator().manual_seed(recipe.seed)
    averaged = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    plan = [(cycle, at) for cycle in chosen for at in range(cycle.images // recipe.batch)]
    step, steps, null_label = 0, len(plan), ARCHITECTURE.num_classes

    recipe.out.mkdir(parents=True, exist_ok=True)
    checkpoint = recipe.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, step = state["averaged"], state["step"]
        generator.set_state(state["generator"])

    began, running = time.monotonic(), 0.0
    began_at = step
    while step < steps:
        cycle, at = plan[step]
        of = cycle.images // recipe.batch
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(at, of, cycle.lr)
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        sigma = (cycle.p_mean + cycle.p_std * torch.randn(recipe.batch, generator=generator)).exp()
        batch, asked = images[rows], labels[rows]
        if cycle.augment:
            batch = moved(batch, cycle.augment * (1 - at / of), generator)
        if cycle.label_dropout:
            asked = asked.where(torch.rand(recipe.batch, generator=generator) >= cycle.label_dropout, null_label)
        batch = batch.to(memory_format=torch.channels_last)
        noise = torch.randn(batch.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = edm_loss(network, batch, asked, sigma, noise)
        step += 1
        descend(loss, network, optimizer, averaged, min(cycle.ema, (1 + step) / (10 + step)))
        running += (loss.item() - running) / min(step, 100)
        if step % 50 == 0:
            speed = (step - began_at) * recipe.batch / (time.monotonic() - began)
            print(f"step {step}/{steps}  loss {running:.4f}  {speed:.0f} images/s", flush=True)
        if step % recipe.checkpoint_every == 0 or step == steps:
            save_checkpoint(
                checkpoint,
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged,
                    "generator": generator.get_state(),
                    "step": step,
                },
            )

    weights = {name: weight.to(torch.float16).contiguous() for name, weight in averaged.items()}
    recorded = {name: str(value) for name, value in asdict(recipe).items() if name not in ("out", "start")}
    save_file(weights, recipe.out / "digits.safetensors", metadata=recorded)
    print(f"wrote {recipe.out / 'digits.safetensors'}")


if __name__ == "__main__":
    train(recipe_of(Recipe, __doc__))
