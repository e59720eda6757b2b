"""A sampling script that calls the sampling function by keyword only, through an adapter."""

import json
import os
import sys

import cm.script_util as script_util
import numpy as np
import torch
from cm import dist_util, karras_diffusion, logger, random_util


class Sampler:
    """Holds what stays the same from call to call."""

    def __init__(self, **fixed):
        self.fixed = fixed

    def __call__(self, **changing):
        return karras_diffusion.karras_sample(**self.fixed, **changing)


def main(flags_file, model_path):
    dist_util.setup_dist()
    logger.configure(dir=os.environ["SAMPLES"])
    with open(flags_file) as file:
        flags = json.load(file)
    model, diffusion = script_util.create_model_and_diffusion(**flags, distillation=True)
    model.load_state_dict(dist_util.load_state_dict(model_path))
    model.to(dist_util.dev())
    model.eval()
    sampler = Sampler(diffusion=diffusion, model=model, steps=40, sampler="multistep", ts=(0, 17, 39))
    labels = torch.tensor([0, 3, 999, 500], device=dist_util.dev())
    x = sampler(
        shape=(len(labels), 3, flags["image_size"], flags["image_size"]),
        model_kwargs={"y": labels},
        device=dist_util.dev(),
        generator=random_util.get_generator(generator="determ", num_samples=len(labels), seed=42),
    )
    pixels = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    np.savez(os.path.join(logger.get_dir(), "samples_4x32x32x3.npz"), pixels.cpu().numpy(), labels.cpu().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
