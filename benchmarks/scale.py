"""Does a shard cost the driver more where there are more actors, or more shards?

The driver's dispatch, pool and inventory run on the simulated cluster of `make simulate`, without a fault: its actors
answer by a virtual clock, one after another and together a hundred times a second, however many they are. What is
counted is the processor time between the driver's calls to Ray; what Ray takes in those is not in it. Each run is a
separate process.
"""

from __future__ import annotations

import subprocess
import sys

from table import Goal, Row, in_turn, parser, report
from tests.simulation.play import Simulation
from tests.simulation.storm import Settings

RATE = 100.0
"""Shards a second."""

FEW, MANY = 10, 1_000
SHORT, MIDDLE, LONG = 10_000, 100_000, 1_000_000


def drive_here(actors: int, shards: int) -> float:
    """Microseconds of the driver's time a shard."""
    simulation = Simulation(Settings(actors=actors, shards=shards, kills=0, nodes=0))
    storm = simulation.storm
    storm.linger, storm.room, storm.seconds, storm.upload_s = 0.0, 1, actors / RATE, 0.0
    for _ in range(actors):
        storm.add_node()
    outcome = simulation.run()
    assert outcome.finished == shards
    return 1e6 * outcome.driver_seconds / shards


def drive(actors: int, shards: int) -> float:
    command = [sys.executable, __file__, "--drive", str(actors), str(shards)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--drive", type=int, nargs=2, help="internal: drive this number of actors through this number of shards"
    )
    arguments = made.parse_args()
    if arguments.drive:
        print(drive_here(*arguments.drive))
        return
    many, few = in_turn(3, lambda: drive(MANY, MIDDLE), lambda: drive(FEW, MIDDLE))
    long, short = in_turn(2, lambda: drive(FEW, LONG), lambda: drive(FEW, SHORT))
    rows = [
        Row("the driver's time a shard: 1,000 actors against 10", many, few, "us", Goal("at most", 1.2)),
        Row("the driver's time a shard: 1,000,000 shards against 10,000", long, short, "us", Goal("at most", 1.2)),
    ]
    report(rows, [], arguments.json)


if __name__ == "__main__":
    main()
