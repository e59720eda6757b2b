"""`make simulate`: a run of very many shards on a simulated cluster on which things go wrong as a seed has it.

Prints one line of JSON. Exit code 0: every shard was finished, or given up with a reason, and every invariant held.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tests.simulation.play import SAFEGUARDS, Simulation
from tests.simulation.storm import Settings


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def whole(least: int, what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}; give a whole number, {least} or more")
        return value

    return parse


def settings_of(arguments: Sequence[str] | None) -> Settings:
    parser = Parser(prog="python -m tests.simulation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=whole(0, "a seed"), default=0, help="what goes wrong, where and when")
    parser.add_argument("--actors", type=whole(1, "a number of actors"), default=Settings.actors)
    parser.add_argument("--shards", type=whole(1, "a number of shards"), default=Settings.shards)
    parser.add_argument("--kills", type=whole(0, "a number of faults"), default=Settings.kills)
    parser.add_argument("--break", dest="broken", choices=SAFEGUARDS, help="disable one safeguard of the driver")
    return Settings(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    outcome = Simulation(settings_of(arguments)).run()
    print(json.dumps(outcome.as_json()), flush=True)
    for reason, shards in outcome.reasons.most_common(5):
        print(f"given up: {shards} shards: {reason}", file=sys.stderr)
    if outcome.broken:
        print(f"broken: {outcome.broken}", file=sys.stderr)
    return 1 if outcome.broken else 0


if __name__ == "__main__":
    sys.exit(main())
