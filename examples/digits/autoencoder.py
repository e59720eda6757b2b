"""Train the autoencoder of `digits-latent`: 32x32 digits to latents of 4x8x8 and back.

A variational autoencoder with a squared error, trained on 3,500 real digits. Its decoder is bundled; the encoder is
needed only to train the transformer of latent.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data import JUDGES_PER_CLASS, load_digits
from ray_sampler.networks.decoders import LATENT_CHANNELS, DigitsDecoder
from recipe import recipe_of
from train import learning_rate, moved


@dataclass(frozen=True)
class Recipe:
    out: Path = Path("runs/train-latent")
    """Folder of the weights."""
    images: int = 200_000
    """Training images seen, repeats included."""
    batch: int = 50
    lr: float = 2e-3
    """Peak learning rate of AdamW, after a linear warm-up of 200 steps, before a cosine decay to 0."""
    deviation: float = 0.1
    """Of a pixel, in [-1, 1], that the squared error counts as one: less means sharper pictures, richer latents."""
    seed: int = 0


class Encoder(nn.Module):
    """Digits (B, 1, 32, 32) in [-1, 1] -> mean and deviation of their latents, both (B, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 64, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 2 * LATENT_CHANNELS, 3, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.layers(images).float().chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-12.0, 4.0)).exp()


def loss(encoder: Encoder, decoder: DigitsDecoder, images: Tensor, noise: Tensor, deviation: float) -> Tensor:
    """Negative evidence bound (Kingma and Welling 2014, eq. 10) in nats a pixel, but for a constant."""
    mean, spread = encoder(images)
    error = (decoder(mean + spread * noise)[:, :1] - images).square().sum() / (2 * deviation**2)
    divergence = (0.5 * (mean.square() + spread.square() - 1) - spread.log()).sum()
    return (error + divergence) / images.numel()


def train(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    data, held_out = load_digits(held_out_per_class=JUDGES_PER_CLASS)
    images, unseen = torch.from_numpy(data.images), torch.from_numpy(held_out.images[:, :1])
    encoder, decoder = Encoder(), DigitsDecoder()
    weights = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01)
    generator = torch.Generator().manual_seed(recipe.seed)
    began, running, steps = time.monotonic(), 0.0, recipe.images // recipe.batch
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, recipe.lr)
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        batch = moved(images[rows], 0.8, generator)[:, :1].to(memory_format=torch.channels_last)
        noise = torch.randn((recipe.batch, LATENT_CHANNELS, 8, 8), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(encoder, decoder, batch, noise, recipe.deviation)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        running += (value.item() - running) / min(step + 1, 100)
        if (step + 1) % 100 == 0:
            speed = (step + 1) * recipe.batch / (time.monotonic() - began)
            print(f"step {step + 1}/{steps}  loss {running:.4f}  {speed:.0f} images/s", flush=True)
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            write(encoder, decoder, images[:, :1], recipe.out)
            report(encoder, decoder, unseen)


@torch.inference_mode()
def write(encoder: Encoder, decoder: DigitsDecoder, images: Tensor, folder: Path) -> None:
    """Write both networks, with latents scaled to unit variance; the scale is part of the decoder's first weights."""
    mean, spread = encoder(images)
    scale = (mean.var((0, 2, 3)) + spread.square().mean((0, 2, 3))).sqrt()
    decoding = {name: weight.half().contiguous() for name, weight in decoder.state_dict().items()}
    decoding["layers.0.weight"] = (decoder.layers[0].weight * scale[:, None, None]).half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(decoding, folder / "digits-decoder.safetensors")
    save_file({**encoder.state_dict(), "scale": scale}, folder / "encoder.safetensors")


@torch.inference_mode()
def report(encoder: Encoder, decoder: DigitsDecoder, images: Tensor) -> None:
    mean, spread = encoder(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    sure, drawn = ((decoder(z)[:, :1] - images).square().mean().sqrt() for z in (mean, mean + spread * noise))
    nats = (0.5 * (mean.square() + spread.square() - 1) - spread.log()).sum((1, 2, 3)).mean()
    print(f"unseen digits: error {sure:.4f} from the mean, {drawn:.4f} from a draw, {nats:.0f} nats", flush=True)


if __name__ == "__main__":
    train(recipe_of(Recipe, __doc__))
