"""Driver, pool, actors and merge: the only part that imports Ray."""

import os

# Before Ray is imported: its C++ part would answer SIGTERM by a stack trace and an alarm that aborts the process.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
# It prints lines on standard output for each process that is lost, and again for each retry; a run says that itself.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", r"^(A worker died or was killed|Task \S+ failed\.)")
