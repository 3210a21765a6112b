"""What the machine offers. Needs no torch, so that the table of options can ask."""

import os


def cpu_cores() -> int:
    """CPU cores that this process may use: containers and job schedulers often grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
