"""Train and evaluate convolutional networks of a token mixer: Conv2d, ConvNN, ConvNN attention, attention, or two in parallel.

The network is a stack of the mixer, or VGG or ResNet with the mixer in place of its 3 x 3 convolutions (--model).
"""

import signal

if __name__ == "__main__":  # before other imports: no traceback of an interrupt; `run` takes signals over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from options.runs import PROGRAMS, oversized_default, parse_options, unused_options
from runs.streams import run_program


def main(argv: list[str] | None = None) -> int:
    program = PROGRAMS["allconvnet_main.py"]
    options, parser = parse_options(program, __doc__, argv)
    # Import torch, which takes seconds, only once the options are valid.
    from models.build import build_network, load_network_weights
    from train_eval import run

    model, given = options.model, parser.given
    warnings = unused_options(options, given) + oversized_default(model, given)
    return run(options, build_network, load_network_weights, program=program, stated=parser.stated, warnings=warnings)


if __name__ == "__main__":
    sys.exit(run_program(main))
