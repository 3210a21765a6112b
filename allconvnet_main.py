"""Train and evaluate convolutional networks of a mixer: Conv2d, ConvNN, ConvNN attention, attention, or two side by side.

A stack of them, or VGG and ResNet with them in the place of 3 x 3 convolutions (--model).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # before other imports: no traceback of one that is interrupted; `run` takes signals over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from options.runs import PROGRAMS, oversized_default, parse_options, unused_options
from runs.streams import run_program


def main(argv: list[str] | None = None) -> int:
    program = PROGRAMS["allconvnet_main.py"]
    options, parser = parse_options(program, __doc__, argv)
    # torch takes seconds to import: only once the options are known to be right.
    from models.build import build_network, load_network_weights
    from train_eval import run

    model, given = options.model, parser.given
    warnings = unused_options(model, given) + oversized_default(model, given)
    return run(options, build_network, load_network_weights, program=program, stated=parser.stated, warnings=warnings)


if __name__ == "__main__":
    sys.exit(run_program(main))
