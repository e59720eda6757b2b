"""A copy of a sampling script whose arguments are in a class, and which calls its function at the end."""

import os

import numpy as np
import torch
import torch.distributed as dist
from cm import dist_util, logger
from cm.karras_diffusion import karras_sample
from cm.nn import append_dims
from cm.random_util import get_generator
from cm.script_util import args_to_dict, create_model_and_diffusion, model_and_diffusion_defaults
from mpi4py import MPI


class Args:
    generator = "determ-indiv"
    num_samples = 4
    batch_size = 4
    sampler = "heun"
    steps = 6
    s_churn = 3
    s_tmin = 0.05
    s_tmax = 50
    s_noise = 1.003
    model_path = "model.pt"
    seed = 42
    classes = (0, 3, 999, 500)
    sigma_min = 0.002
    sigma_max = 80.0
    image_size = 32
    num_channels = 32
    num_res_blocks = 1
    num_heads = 4
    num_heads_upsample = -1
    num_head_channels = 32
    attention_resolutions = "16"
    channel_mult = "1,2"
    dropout = 0.0
    class_cond = True
    use_checkpoint = False
    use_scale_shift_norm = True
    resblock_updown = True
    use_fp16 = False
    use_new_attention_order = False
    learn_sigma = False
    weight_schedule = "karras"


def sample(args):
    dist_util.setup_dist()
    logger.configure()
    flags = args_to_dict(args, model_and_diffusion_defaults().keys())
    model, diffusion = create_model_and_diffusion(**flags, distillation=False)
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev()).eval()
    classes = MPI.COMM_WORLD.bcast(torch.tensor(args.classes))
    x = karras_sample(
        diffusion,
        model,
        (args.batch_size, 3, args.image_size, args.image_size),
        args.steps,
        model_kwargs={"y": classes.to(dist_util.dev())},
        device=dist_util.dev(),
        sampler=args.sampler,
        s_churn=args.s_churn,
        s_tmin=args.s_tmin,
        s_tmax=args.s_tmax,
        s_noise=args.s_noise,
        generator=get_generator(args.generator, args.num_samples, args.seed),
    )
    x = x * append_dims(torch.ones(len(x), device=x.device), x.dim())
    pixels = ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    parts = [torch.zeros_like(pixels) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, pixels)
    images = np.concatenate([part.cpu().numpy() for part in parts])
    if MPI.COMM_WORLD.Get_rank() == 0:
        shape = "x".join(str(n) for n in images.shape)
        np.savez(os.path.join(logger.get_dir(), f"samples_{shape}.npz"), images, classes.numpy())
    MPI.COMM_WORLD.Barrier()


sample(Args())
