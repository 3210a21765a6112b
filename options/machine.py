"""Resources of the machine, without torch."""

import os


def cpu_cores() -> int:
    """Return the CPU cores that this process may use; containers and schedulers often grant only some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
