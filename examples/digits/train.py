"""Train the bundled digits model: a class-conditional EDM UNet on 4,500 real digits.

Interrupted, it goes on from its last checkpoint when the same command is run again.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data import load_digits
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.parameterisation import Edm, edm_scalings
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


@dataclass(frozen=True)
class Recipe:
    out: Path = Path("runs/train-digits")
    """Folder of the checkpoint and of the finished weights."""
    images: int = 320_000
    """Training images seen in the first cycle of the learning rate, repeats included."""
    more_images: int = 140_000
    """Training images of a second cycle, at half the peak rate, which looks at higher noise: there the structure of
    a digit is decided."""
    batch: int = 64
    lr: float = 2e-3
    """Peak learning rate of AdamW, after a linear warm-up of 200 steps, before a cosine decay to 0."""
    ema: float = 0.998
    """Decay of the averaged weights, a step."""
    p_mean: float = -0.6
    p_std: float = 1.5
    """Mean and deviation of ln sigma."""
    more_p_mean: float = 0.3
    more_p_std: float = 1.4
    """The same in the second cycle."""
    seed: int = 0
    checkpoint_every: int = 250
    """Steps."""
    threads: int = 1


def edm_loss(network: UNet, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean of lambda(sigma) |D(y + n, sigma) - y|^2, lambda = 1 / c_out^2 (Karras et al. 2022, eq. 2 and table 1)."""
    denoise = Edm("250log").denoiser(network, labels)
    noisy = images + sigma[:, None, None, None] * noise
    _, c_out, _ = edm_scalings(sigma)
    return ((denoise(noisy, sigma) - images) / c_out[:, None, None, None]).square().mean()


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())


def channels_last(network: UNet) -> UNet:
    """Keep convolution weights in the layout that convolutions are fastest in; the values stay."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


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
    network = channels_last(UNet(ARCHITECTURE))
    generator = torch.Generator().manual_seed(recipe.seed)
    averaged = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=0.01)
    first, second = recipe.images // recipe.batch, recipe.more_images // recipe.batch
    step, steps = 0, first + second

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
        if step < first:
            rate, p_mean, p_std = learning_rate(step, first, recipe.lr), recipe.p_mean, recipe.p_std
        else:
            rate = learning_rate(step - first, second, recipe.lr / 2)
            p_mean, p_std = recipe.more_p_mean, recipe.more_p_std
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        sigma = (p_mean + p_std * torch.randn(recipe.batch, generator=generator)).exp()
        batch = images[rows].to(memory_format=torch.channels_last)
        noise = torch.randn(batch.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = edm_loss(network, batch, labels[rows], sigma, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in network.state_dict().items():
                averaged[name].lerp_(weight, 1 - decay)
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
    recorded = {name: str(value) for name, value in asdict(recipe).items() if name != "out"}
    save_file(weights, recipe.out / "digits.safetensors", metadata=recorded)
    print(f"wrote {recipe.out / 'digits.safetensors'}")


if __name__ == "__main__":
    train(recipe_of(Recipe, __doc__))
