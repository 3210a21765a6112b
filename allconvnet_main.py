"""Train and evaluate all-convolutional networks: Conv2d, ConvNN, ConvNN attention, attention, or two of them side by side."""

from __future__ import annotations

import signal
import sys

from options import PROGRAMS, parse_options, warn_oversized, warn_without_effect


def main(argv: list[str] | None = None) -> int:
    options, parser = parse_options(PROGRAMS["allconvnet_main.py"], __doc__, argv)
    warn_without_effect(options.model, parser)
    warn_oversized(options.model, parser)
    # torch takes seconds to import: only once the options are known to be right.
    from allconvnet import AllConvNet
    from train_eval import run

    return run(options, lambda: AllConvNet(options.model), parser.error)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an interrupted import; `run` takes signals over
    sys.exit(main())
