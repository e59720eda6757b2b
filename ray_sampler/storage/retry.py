"""Try again what may pass, and look again for what a cache may hide: bounded, with growing random pauses, announced.

This is the one layer that tries again. Where a library beneath it would do so as well, their attempts multiply, and a
lasting failure takes hours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

logger = logging.getLogger(__name__)

ATTEMPTS = 6

BACKOFF_S = 1.0
"""Longest wait before the second attempt; it doubles with each, and what is waited is drawn from 0 to it."""

LONGEST_WAIT_S = 16.0
GIVE_UP_S = 60.0
"""A request that fails so long after its first attempt is not tried again."""

HIDDEN_S = 75.0
"""How long a name may stay hidden after it was written: NFS clients keep what a folder holds for up to a minute."""

FIRST_LOOK_S = 0.25
LONGEST_LOOK_S = 5.0

Result = TypeVar("Result")


def persist(
    request: Callable[[], Result],
    passing: Callable[[BaseException], bool],
    said: Callable[[BaseException], str],
    where: str,
) -> Result:
    """What `request` gives, tried again while it fails in a way that passes.

    Args:
        passing: whether the same request may succeed a moment later.
        said: a failure in a few words, without a credential.
        where: what answered so, for the log.
    """

    def log(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning(
            "%s answered %s; attempt %d of %d follows in %.1f s",
            where, said(error) if error else "", state.attempt_number + 1, ATTEMPTS, state.upcoming_sleep,
        )  # fmt: skip

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_after_delay(GIVE_UP_S),
        wait=tenacity.wait_random_exponential(multiplier=BACKOFF_S, max=LONGEST_WAIT_S),
        retry=tenacity.retry_if_exception(passing),
        before_sleep=log,
        reraise=True,
    )
    return retrying(request)


def look_again(look: Callable[[], Result | None], name: str, seconds: float) -> Result | None:
    """What `look` finds, asked again for `seconds` at most while it is None."""
    found = look()
    if found is not None or seconds <= 0:
        return found
    logger.warning("%s is not visible yet; looking again for up to %.0f s, as a cache may hide it", name, seconds)
    pause, deadline = FIRST_LOOK_S, time.monotonic() + seconds
    while found is None and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_LOOK_S)
        found = look()
    return found
