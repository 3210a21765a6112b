"""Machine resources, without torch."""

import os


def cpu_cores() -> int:
    """Return the number of CPU cores available to this process, which containers and schedulers may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
