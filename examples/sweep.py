"""A sweep by a loop: which solver and how many evaluations? Each point is a run that resumes by itself.

python examples/sweep.py              # writes runs/sweep/scores.csv
"""

import csv
import itertools

import ray

from ray_sampler import RunConfig, run


def main(num_samples: int = 128, budgets: tuple[int, ...] = (6, 10, 16)) -> str:
    """Returns the path of the table: solver, NFE, and the Frechet distance to real digits."""
    ray.init(ignore_reinit_error=True)  # one Ray for all runs; otherwise each run starts its own
    rows = []
    for solver, nfe in itertools.product(("dpmpp_2m", "heun"), budgets):
        folder = f"runs/sweep/{solver}-{nfe}"
        result = run(RunConfig(sampler=solver, nfe=nfe, num_samples=num_samples, score="digits", output=folder))
        rows.append((solver, result.summary["nfe"], result.summary["scores"]["metrics"]["fid"]))
    with open("runs/sweep/scores.csv", "w", newline="") as file:
        csv.writer(file).writerows([("solver", "nfe", "fid"), *rows])
    for solver, nfe, fid in rows:
        print(f"{solver:10} {nfe:3} evaluations: {fid:8.2f}")
    return "runs/sweep/scores.csv"


if __name__ == "__main__":
    main()
