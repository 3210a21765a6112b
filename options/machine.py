"""Machine resources, without torch."""

import os
import tempfile
from pathlib import Path


def cpu_cores() -> int:
    """Return the number of CPU cores available to this process, which containers and schedulers may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Return $CONVNN_CACHE, or `convnn` in the user's cache folder; without a home, in the folder for temporary files."""
    if own := os.environ.get("CONVNN_CACHE"):
        return Path(own)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches if os.path.isabs(caches) else tempfile.gettempdir()) / "convnn"
