"""What other people's sampling scripts call our flags."""

SYNONYMS = {
    **dict.fromkeys(("ckpt", "ckpt_path", "checkpoint", "network", "net", "network_pkl", "weights_path"), "--model"),
    **dict.fromkeys(("outdir", "out_dir", "output_dir", "out", "sample_dir", "save_dir", "logdir"), "--output"),
    **dict.fromkeys(("num_sampling_steps", "num_steps", "num_inference_steps", "sampling_steps", "nfe"), "--steps"),
    **dict.fromkeys(("cfg_scale", "cfg", "guidance_scale", "w"), "--guidance"),
    **dict.fromkeys(("class", "class_idx", "class_labels", "class_label", "classes"), "--labels"),
    **dict.fromkeys(("num", "n", "num_fid_samples", "n_samples", "number"), "--num_samples"),
    **dict.fromkeys(("batch", "per_proc_batch_size", "max_batch_size", "bs"), "--batch_size"),
    **dict.fromkeys(("global_seed", "random_seed"), "--seed"),
    **dict.fromkeys(("gnet", "guidance_network"), "--guide"),
    **dict.fromkeys(("solver", "sampler_type", "sampling_method", "scheduler", "mode"), "--sampler"),
    **dict.fromkeys(("S_churn", "S_min", "S_max", "S_noise"), "--s_churn, --s_tmin, --s_tmax or --s_noise"),
    **dict.fromkeys(("seeds", "seed_range"), "--generator edm --seed"),
    "vae": "--decoder",
}
"""Ours, by theirs. `--seeds 0-49999` is `--generator edm --seed 0 --num_samples 50000` here."""
