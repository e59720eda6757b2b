"""Train the transformer of `digits-latent`: a class-conditional flow over the latents of autoencoder.py.

After an interruption, the same command continues from the last checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoencoder import Encoder
from data import JUDGES_PER_CLASS, load_digits
from ray_sampler.networks.decoders import LATENT_CHANNELS
from ray_sampler.networks.dit import DitOptions, Transformer
from recipe import recipe_of
from train import descend, learning_rate, moved, save_checkpoint

NULL_LABEL = 10


@dataclass(frozen=True)
class Recipe:
    out: Path = Path("runs/train-latent")
    """Folder of the encoder, the checkpoint and the finished weights."""
    images: int = 1_200_000
    """Latents seen, repeats included."""
    batch: int = 64
    lr: float = 1e-3
    """Peak learning rate of AdamW, after a linear warm-up of 200 steps, before a cosine decay to 0."""
    ema: float = 0.9995
    """Decay of the averaged weights, a step."""
    label_dropout: float = 0.1
    """Share of labels that are replaced by the null label."""
    variants: int = 24
    """How often each digit is encoded, turned, scaled and sheared a little differently each time."""
    augment: float = 0.8
    """Share of them that is moved at all."""
    t_mean: float = 0.3
    t_std: float = 1.1
    """Of the logit of t, the share of noise. The structure of a digit is decided at high noise."""
    dropout: float = 0.05
    """Of what each block adds."""
    seed: int = 0
    checkpoint_every: int = 500
    """Steps."""


ARCHITECTURE = DitOptions(
    input_size=8,
    patch_size=2,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    width=128,
    depth=6,
    mlp_width=512,
    frequencies=256,
    label_rows=NULL_LABEL + 1,
    head_channels=None,
    num_heads=4,
    num_classes=NULL_LABEL,
)


def initialised(dropout: float) -> Transformer:
    """A new network: what a block adds, and the output, begin at 0. Each addition loses a share of `dropout`."""
    network = Transformer(ARCHITECTURE)
    width, side = ARCHITECTURE.width, ARCHITECTURE.input_size // ARCHITECTURE.patch_size
    network.pos_embed = nn.Parameter(position_table(width, side), requires_grad=False)
    for name, weight in network.named_parameters():
        if "embedding_table" in name:
            nn.init.normal_(weight, std=0.02)
        elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(weight)
    for name, module in network.named_modules():
        if name.startswith("blocks.") and name.endswith((".attn", ".mlp")):
            module.register_forward_hook(lambda module, args, result: F.dropout(result, dropout, module.training))
    return network.train()


def position_table(width: int, side: int) -> Tensor:
    """(1, side^2, width): sines and cosines of the column, then of the row, as in the published transformers."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def flow_loss(network: nn.Module, latents: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Mean of |v(x_t, t) - (noise - x)|^2 with x_t = (1 - t) x + t noise (Lipman et al. 2023; Ma et al. 2024)."""
    share = t[:, None, None, None]
    return (network((1 - share) * latents + share * noise, t, labels) - (noise - latents)).square().mean()


@torch.inference_mode()
def encoded(recipe: Recipe, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of each variant of each digit, (variants, N, 4, 8, 8) float16."""
    stored = load_file(recipe.out / "encoder.safetensors")
    scale = stored.pop("scale").view(1, -1, 1, 1)
    encoder = Encoder()
    encoder.load_state_dict(stored)
    means, spreads = [], []
    for variant in range(recipe.variants):
        for rows in torch.arange(len(images)).split(500):
            batch = images[rows, :1] if variant == 0 else moved(images[rows], recipe.augment, generator)[:, :1]
            mean, spread = encoder(batch.to(memory_format=torch.channels_last))
            means.append((mean / scale).half())
            spreads.append((spread / scale).half())
    shape = (recipe.variants, len(images), *means[0].shape[1:])
    return torch.cat(means).view(shape), torch.cat(spreads).view(shape)


def train(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(recipe.seed)
    data, _ = load_digits(held_out_per_class=JUDGES_PER_CLASS)
    labels = torch.from_numpy(data.labels)
    means, spreads = encoded(recipe, torch.from_numpy(data.images), generator)
    print("encoded", flush=True)
    network = initialised(recipe.dropout)
    averaged = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    step, steps = 0, recipe.images // recipe.batch
    checkpoint = recipe.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, step = state["averaged"], state["step"]
        generator.set_state(state["generator"])

    began, began_at, running = time.monotonic(), step, 0.0
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, recipe.lr)
        count = (recipe.batch,)
        variant = torch.randint(recipe.variants, count, generator=generator)
        row = torch.randint(len(labels), count, generator=generator)
        mean, spread = means[variant, row].float(), spreads[variant, row].float()
        latents = mean + spread * torch.randn(mean.shape, generator=generator)
        asked = labels[row].where(torch.rand(count, generator=generator) >= recipe.label_dropout, NULL_LABEL)
        t = (recipe.t_mean + recipe.t_std * torch.randn(count, generator=generator)).sigmoid()
        noise = torch.randn(latents.shape, generator=generator)
        loss = flow_loss(network, latents, asked, t, noise)
        step += 1
        descend(loss, network, optimizer, averaged, min(recipe.ema, (1 + step) / (10 + step)))
        running += (loss.item() - running) / min(step, 200)
        if step % 100 == 0:
            speed = (step - began_at) * recipe.batch / (time.monotonic() - began)
            print(f"step {step}/{steps}  loss {running:.4f}  {speed:.0f} images/s", flush=True)
        if step % recipe.checkpoint_every == 0 or step == steps:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "averaged": averaged}
            save_checkpoint(checkpoint, state | {"generator": generator.get_state(), "step": step})
            weights = {name: weight.half().contiguous() for name, weight in averaged.items()}
            recorded = {name: str(value) for name, value in asdict(recipe).items() if name != "out"}
            save_file(weights, recipe.out / "digits-latent.safetensors", metadata=recorded)


if __name__ == "__main__":
    train(recipe_of(Recipe, __doc__))
