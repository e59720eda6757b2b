"""Distil the bundled digits model into a consistency model (Song et al. 2023, algorithm 2).

After an interruption, the same command continues from the last checkpoint.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import load_digits
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.parameterisation import Denoiser, clipped, parameterise
from ray_sampler.sampling.schedules import karras_sigmas
from recipe import recipe_of
from train import ARCHITECTURE, channels_last, learning_rate, save_checkpoint

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


@dataclass(frozen=True)
class Recipe:
    teacher: Path = Path("runs/train-digits/digits.safetensors")
    """Weights of the EDM model."""
    out: Path = Path("runs/distil-digits")
    """Folder of the checkpoint and of the finished weights."""
    images: int = 64_000
    """Training images seen in all, repeats included."""
    batch: int = 64
    lr: float = 5e-4
    """Peak learning rate of AdamW, after a linear warm-up of 200 steps, before a cosine decay to 0."""
    levels: int = 18
    """Noise levels of the teacher's schedule, between neighbours of which the student learns to agree."""
    target_ema: float = 0.95
    """Decay of the target network, a step."""
    ema: float = 0.998
    """Decay of the weights that are kept, a step."""
    huber: float = 0.03
    """Where the pseudo-Huber loss turns from square to linear (Song & Dhariwal 2023, section 3.3)."""
    seed: int = 0
    checkpoint_every: int = 100
    """Steps."""
    threads: int = 1


def heun_step(denoise: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One step of Heun's method for each image, from levels sigma to sigma_next, (B,) each (Karras et al. 2022)."""
    step = (sigma_next - sigma)[:, None, None, None]
    d = (x - denoise(x, sigma)) / sigma[:, None, None, None]
    x_next = x + d * step
    d_next = (x_next - denoise(x_next, sigma_next)) / sigma_next[:, None, None, None]
    return x + (d + d_next) / 2 * step


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(|difference|^2 / n + c^2) - c of each image of n values: (B, C, H, W) -> (B,)."""
    return (difference.square().mean(dim=(1, 2, 3)) + c**2).sqrt() - c


def average(towards: dict[str, Tensor], weights: dict[str, Tensor], decay: float) -> None:
    for name, weight in weights.items():
        towards[name].lerp_(weight, 1 - decay)


def distil(recipe: Recipe) -> None:
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    data, _ = load_digits()
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    teacher = channels_last(UNet(ARCHITECTURE))
    teacher.load_state_dict({name: weight.float() for name, weight in load_file(recipe.teacher).items()})
    teacher.requires_grad_(False)
    student, target = copy.deepcopy(teacher).requires_grad_(True), copy.deepcopy(teacher)
    averaged = {name: weight.detach().clone() for name, weight in student.state_dict().items()}
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=recipe.lr, weight_decay=0.0)
    sigmas = karras_sigmas(recipe.levels, SIGMA_MIN, SIGMA_MAX)[:-1]
    taught, learned = parameterise("edm", c_noise="250log"), parameterise("consistency", SIGMA_MIN)
    step, steps = 0, recipe.images // recipe.batch

    recipe.out.mkdir(parents=True, exist_ok=True)
    checkpoint = recipe.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(state["student"])
        target.load_state_dict(state["target"])
        optimizer.load_state_dict(state["optimizer"])
        averaged, step = state["averaged"], state["step"]
        generator.set_state(state["generator"])

    began, began_at, running = time.monotonic(), step, 0.0
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, recipe.lr)
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        level = torch.randint(recipe.levels - 1, (recipe.batch,), generator=generator)
        sigma, sigma_next, y = sigmas[level], sigmas[level + 1], labels[rows]
        clean = images[rows].to(memory_format=torch.channels_last)
        x = clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                teach = clipped(taught.denoiser(teacher, y))
                x_next = heun_step(teach, x, sigma, sigma_next)
                aim = clipped(learned.denoiser(target, y))(x_next, sigma_next)
            guess = learned.denoiser(student, y)(x, sigma)
            loss = pseudo_huber(guess - aim, recipe.huber).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            average(target.state_dict(), student.state_dict(), recipe.target_ema)
            average(averaged, student.state_dict(), min(recipe.ema, (1 + step) / (10 + step)))
        running += (loss.item() - running) / min(step, 100)
        if step % 50 == 0:
            rate = (step - began_at) * recipe.batch / (time.monotonic() - began)
            print(f"step {step}/{steps}  loss {running:.4f}  {rate:.0f} images/s", flush=True)
        if step % recipe.checkpoint_every == 0 or step == steps:
            save_checkpoint(
                checkpoint,
                {
                    "student": student.state_dict(),
                    "target": target.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged,
                    "generator": generator.get_state(),
                    "step": step,
                },
            )

    weights = {name: weight.to(torch.float16).contiguous() for name, weight in averaged.items()}
    recorded = {name: str(value) for name, value in asdict(recipe).items() if name not in ("out", "teacher")}
    save_file(weights, recipe.out / "digits-cd.safetensors", metadata=recorded)
    print(f"wrote {recipe.out / 'digits-cd.safetensors'}")


if __name__ == "__main__":
    distil(recipe_of(Recipe, __doc__))
