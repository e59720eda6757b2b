"""What `cm` is to a script that `python -m ray_sampler.compat` runs: the modules that sampling scripts import."""
