"""Train and evaluate vision transformers with another token mixer: ConvNN, k-NN, local or sparse attention and others."""

import signal

if __name__ == "__main__":  # before other imports: no traceback of an interrupt; `run` takes signals over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys

from options.runs import PROGRAMS, parse_options, unused_options
from runs.streams import run_program


def main(argv: list[str] | None = None) -> int:
    program = PROGRAMS["vit_main.py"]
    options, parser = parse_options(program, __doc__, argv)
    # Import torch, which takes seconds, only once the options are valid.
    from models.build import build_network, load_network_weights
    from train_eval import run

    warnings = unused_options(options, parser.given)
    return run(options, build_network, load_network_weights, program=program, stated=parser.stated, warnings=warnings)


if __name__ == "__main__":
    sys.exit(run_program(main))
