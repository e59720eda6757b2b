"""A sampling script with flags, for several processes, as users of the consistency-models repository write them."""

import argparse
import os

import numpy as np
import torch
import torch.distributed as dist
from cm import dist_util, logger
from cm.karras_diffusion import karras_sample
from cm.random_util import get_generator
from cm.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from mpi4py import MPI


def main():
    args = parser().parse_args()
    dist_util.setup_dist()
    logger.configure()

    logger.log("loading the network")
    flags = args_to_dict(args, model_and_diffusion_defaults().keys())
    model, diffusion = create_model_and_diffusion(**flags, distillation="consistency" in args.training_mode)
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev())
    if args.use_fp16:
        model.convert_to_fp16()
    model.eval()

    seed = MPI.COMM_WORLD.bcast(args.seed if dist.get_rank() == 0 else None)
    generator = get_generator(args.generator, args.num_samples, seed)
    ts = tuple(int(t) for t in args.ts.split(",")) if args.sampler == "multistep" else None
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    while sum(len(part) for part in images) < args.num_samples:
        model_kwargs = {}
        if args.class_cond:
            model_kwargs["y"] = torch.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
        x = karras_sample(
            diffusion,
            model,
            (args.batch_size, 3, args.image_size, args.image_size),
            steps=args.steps,
            model_kwargs=model_kwargs,
            device=dist_util.dev(),
            clip_denoised=args.clip_denoised,
            sampler=args.sampler,
            sigma_min=args.sigma_min,
            sigma_max=args.sigma_max,
            s_churn=args.s_churn,
            s_tmin=args.s_tmin,
            s_tmax=args.s_tmax,
            s_noise=args.s_noise,
            generator=generator,
            ts=ts,
        )
        pixels = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        images += gathered(pixels)
        if args.class_cond:
            labels += gathered(model_kwargs["y"])
        logger.log(f"{sum(len(part) for part in images)} samples")

    if dist.get_rank() == 0:
        arrays = [np.concatenate(parts)[: args.num_samples] for parts in (images, labels) if parts]
        path = os.path.join(logger.get_dir(), f"samples_{'x'.join(map(str, arrays[0].shape))}.npz")
        logger.log(f"writing {path}")
        np.savez(path, *arrays)
    dist.barrier()
    logger.log("done")


def gathered(tensor):
    parts = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return [part.cpu().numpy() for part in parts]


def parser():
    defaults = {
        "training_mode": "edm",
        "generator": "determ",
        "clip_denoised": True,
        "num_samples": 100,
        "batch_size": 4,
        "sampler": "heun",
        "s_churn": 0.0,
        "s_tmin": 0.0,
        "s_tmax": float("inf"),
        "s_noise": 1.0,
        "steps": 40,
        "model_path": "",
        "seed": 42,
        "ts": "",
    }
    defaults.update(model_and_diffusion_defaults())
    made = argparse.ArgumentParser()
    add_dict_to_argparser(made, defaults)
    return made


if __name__ == "__main__":
    main()
