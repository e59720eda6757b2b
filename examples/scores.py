"""Score finished samples against a reference: one step of the consistency model, and two.

    python examples/scores.py             # writes runs/scores/*/scores.json

`score` takes a run, an archive of any tool, or a folder of pictures. A reference of your own pictures is made by
`ray-sampler reference`; with the reference "digits" the features are those of a bundled classifier of digits.
"""

import ray

from ray_sampler import RunConfig, run, score


def main(num_samples: int = 500) -> list[float]:
    """Returns the Frechet distances of one step and of two."""
    ray.init(ignore_reinit_error=True)  # one Ray for all runs; otherwise each run starts its own
    one = RunConfig(model="digits-cd", num_samples=num_samples, output="runs/scores/one-step")
    two = RunConfig(
        model="digits-cd", sampler="multistep", ts="0,9,17", num_samples=num_samples, output="runs/scores/two-steps"
    )
    found = []
    for config in (one, two):
        run(config)
        metrics = score(str(config.output), "digits", metrics="fid,kid,pr,is")["metrics"]
        print(config.output, metrics)
        found.append(metrics["fid"])
    return found


if __name__ == "__main__":
    main()
