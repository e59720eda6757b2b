"""Driver, pool, actors and merge: the only part that imports Ray."""

import os

# Before Ray is imported: its C++ part would answer SIGTERM by a stack trace and an alarm that aborts the process.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
