"""Train and evaluate vision transformers whose attention is replaced by ConvNN, k-NN, local or sparse attention and others."""

from __future__ import annotations

import signal
import sys

from options import PROGRAMS, parse_options, warn_without_effect


def main(argv: list[str] | None = None) -> int:
    options, parser = parse_options(PROGRAMS["vit_main.py"], __doc__, argv)
    warn_without_effect(options.model, parser)
    # torch takes seconds to import: only once the options are known to be right.
    from train_eval import run
    from vit import ViT, load_vit_weights

    return run(options, lambda: ViT(options.model), parser.error, load_vit_weights)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an interrupted import; `run` takes signals over
    sys.exit(main())
