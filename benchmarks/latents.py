"""Does an actor's memory grow with N where latents of 4x32x32 are decoded to 256 pixels?

A network of one value and a small AutoencoderKL of random weights stand in for real ones: pictures and latents have the
sizes of DiT's, and what could grow with N is not in the networks. One run; ours is the actor's peak (VmHWM) at its
end, theirs the one when a quarter of the samples was written.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from memory import PARTS, peak_mib
from ray_sampler.networks.decoders import autoencoder_class
from table import Goal, Row, parser, report

SAMPLES, SHARD, SIDE = 20_480, 256, 256
FLAGS = (
    f"--model python:stub:latents --sampler onestep --batch_size 64 --decoder_batch 16 --shard_size {SHARD} "
    f"--num_samples {SAMPLES} --keep_latents True --max_actors 1 --cpus_per_actor 1 --gpus_per_actor 0 --progress none"
)
GOAL = Goal("at most", 1.1)


def save_autoencoder(folder: Path) -> Path:
    """Save an AutoencoderKL whose pictures are eight times as large as its latents."""
    autoencoder_class()(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


def peaks(folder: Path) -> tuple[float, float]:
    """MiB of the actor at most, until a quarter of the samples was written, and until the run ended."""
    output = folder / "run"
    paths = ["--decoder", str(save_autoencoder(folder / "vae")), "--output", str(output)]
    command = [sys.executable, "-m", "ray_sampler", "sample", *FLAGS.split(), *paths]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent)
    early = latest = 0.0
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if PARTS["actor"] in " ".join(child.cmdline()):
                    latest = max(latest, peak_mib(child.pid))
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue
        if not early and len(list(output.glob("fragments/*.parquet"))) * SHARD >= SAMPLES // 4:
            early = latest
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the run failed with {process.returncode}")
    return early, latest


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        early, latest = peaks(Path(folder))
    rows = [Row(f"peak memory of the actor: {SAMPLES:,} samples against a quarter", (latest,), (early,), "MiB", GOAL)]
    size = SHARD * (SIDE * SIDE * 3 + 4 * 32 * 32 * 4) / 2**20
    note = (
        f"A shard of {SHARD} has {size:.0f} MiB of pictures and latents, all of them {size * SAMPLES / SHARD:,.0f} MiB."
    )
    report(rows, [note], arguments.json)


if __name__ == "__main__":
    main()
