"""Progress of a run on the terminal."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Context with a tqdm bar over images if stderr is a terminal, else with a line there at most every 30 seconds.

    total: 0 if it is not known.
    """

    LINE_EVERY = 30

    def __init__(self, title: str, total: int, done: int = 0, quiet: bool = False):
        self.title, self.total, self.done, self.quiet = title, total, done, quiet
        self.start, self.first, self.printed = time.monotonic(), done, time.monotonic()
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            self.bar = tqdm(desc=title, total=total or None, initial=done, unit=" images", unit_scale=True, leave=False)

    @property
    def due(self) -> bool:
        """True if it is time to call `show`; reading the numbers for it synchronizes with the device."""
        return not self.quiet and (self.bar is not None or time.monotonic() - self.printed > self.LINE_EVERY)

    def advance(self, images: int) -> None:
        self.done += images
        if self.bar is not None:
            self.bar.update(images)

    def show(self, loss: float | None = None, top1: float | None = None) -> None:
        so_far = "" if loss is None else f"loss {loss:.4f}, top-1 {top1:.2f} %"
        if self.bar is not None:
            self.bar.set_postfix_str(so_far, refresh=False)
            return
        self.printed = time.monotonic()
        # Images of an interrupted run were not read in this time.
        rate = (self.done - self.first) / (self.printed - self.start)
        left = tqdm.format_interval((self.total - self.done) / max(rate, 1e-9))
        of_all, eta = (f"/{self.total:,}", f", ETA {left}") if self.total else ("", "")
        print(
            f"{self.title}: {self.done:,}{of_all} images, {rate:,.0f} images/s{eta}" + (so_far and f", {so_far}"),
            file=sys.stderr,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_exception) -> None:
        if self.bar is not None:
            self.bar.close()


class Timer:
    """Clock that is due every `seconds`; 0: never."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def is_due(self) -> bool:
        """Return whether the time is over, and if so start again."""
        is_over = time.monotonic() - self.last > self.seconds > 0
        if is_over:
            self.last = time.monotonic()
        return is_over


def epoch_line(row: dict, left: float = 0) -> str:
    """Return a row of the history as text: losses per image, accuracies in percent. left: seconds, for the ETA."""
    line = f"epoch {row['epoch']:3d}  time {row['seconds']:7.2f} s"
    for name in ("train", "val", "test"):
        if f"{name}_loss" in row:
            line += f"  {name} loss {row[f'{name}_loss']:.4f} top-1 {row[f'{name}_top1']:6.2f} top-5 {row[f'{name}_top5']:6.2f}"
    return line + (f"  ETA {tqdm.format_interval(left)}" if left else "")
