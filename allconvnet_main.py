"""Train and evaluate convolutional networks of a mixer: Conv2d, ConvNN, ConvNN attention, attention, or two side by side.

A stack of them, or VGG and ResNet with them in the place of 3 x 3 convolutions (--model).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # before other imports: no traceback of one that is interrupted; `run` takes signals over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from functools import partial

from options.runs import PROGRAMS, as_trained, parse_options, warn_oversized, warn_without_effect
from runs.streams import run_program


def main(argv: list[str] | None = None) -> int:
    program = PROGRAMS["allconvnet_main.py"]
    options, parser = parse_options(program, __doc__, argv)
    # torch takes seconds to import: only once the options are known to be right.
    from models.backbones import warn_fitted
    from models.build import build_network, load_network_weights
    from train_eval import run

    def announce() -> None:
        parser.note_repeated()
        warn_without_effect(options.model, parser)
        warn_oversized(options.model, parser)
        warn_fitted(options.model, parser.warn)

    stated = partial(as_trained, program, parser.stated)
    return run(options, build_network, parser.error, load_network_weights, stated, announce)


if __name__ == "__main__":
    sys.exit(run_program(main))
