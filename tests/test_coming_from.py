"""Counterparts and defaults in the tables of docs/coming_from.md exist and are as the page says."""

import pkgutil
import re
import shlex

import pytest

import convnn
import run_experiments
import visualize
from options.benchmark import BenchmarkConfig
from options.data import DATASETS, DataConfig
from options.fields import specs
from options.layers import LAYERS1D_ROWS, LAYERS2D_ROWS
from options.runs import PROGRAMS, Options, parse_options
from options.training import TrainConfig
from tests.test_docs import PATH, ROOT

PAGE = (ROOT / "docs" / "coming_from.md").read_text()
COUNTERPARTS, _, REST = PAGE.partition("\n## Defaults\n")
DEFAULTS, _, COMPUTATIONS = REST.partition("\n## Computations that differ\n")
CONFIGS = [*(program.model for program in PROGRAMS.values()), DataConfig, TrainConfig]
OPTIONS = [(name, spec) for config in (*CONFIGS, BenchmarkConfig) for name, spec in specs(config).items()]
KINDS = {name: spec.kind for name, spec in OPTIONS}
# Files of runs and sweeps, a column of metrics.csv, parameters of a mixer, a launcher.
WRITTEN = """
args.txt model.txt config.yaml train_eval_results.txt metrics.csv metrics.json summary.json summary.csv tradeoff.png
last.pt best.pt epoch_6.pt epoch_10.pt README.md LICENSE qkv proj
""".split()


def table_rows(text: str) -> list[list[str]]:
    """Cells of all tables of three or four columns, without their headers."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if "here" not in row]


def known_flags() -> set[str]:
    parsers = [run_experiments.make_parser(), *visualize.make_parser()._subparsers._group_actions[0].choices.values()]
    flags = {f"--{flag}" for name, spec in OPTIONS for flag in (name, *spec.aliases)} | {"--config", "--no-attention_bias"}
    return flags | {flag for parser in parsers for flag in parser._option_string_actions}


def known_names() -> set[str]:
    choices = {str(choice) for _, spec in OPTIONS for choice in spec.choices or ()}
    return {*convnn.__all__, *LAYERS1D_ROWS, *LAYERS2D_ROWS, *choices, *DATASETS, *WRITTEN}


def test_counterparts_exist():
    flags, names, rows = known_flags(), known_names(), table_rows(COUNTERPARTS)
    assert len(rows) > 150
    for there, here, difference in rows:
        assert here, there
        for span in re.findall(r"`([^`]+)`", there if here == "the same" else here):
            named = re.findall(r"--[\w-]+", span)
            head = re.split(r"[ (]", span)[0]
            assert set(named) <= flags, span
            if named or PATH.fullmatch(head) or head in names or set(head.split("/")) <= names:
                continue  # tests/test_docs.py looks for files
            first, *rest = head.split(".")
            pkgutil.resolve_name(f"convnn:{head}" if first in convnn.__all__ and rest else head)
        for span in re.findall(r"`(--[\w-]+)", difference):
            assert span in flags, span


def value_of(options: Options, name: str):
    return next(getattr(part, name) for part in (options.model, options.data, options.train) if hasattr(part, name))


@pytest.mark.parametrize(("program", "there", "here"), [row[1:] for row in table_rows(DEFAULTS)])
def test_defaults(program, there, here):
    program, (flag, *values) = PROGRAMS[program.strip("`")], shlex.split(there.strip("`"))
    name = flag.removeprefix("--")
    default, restored = (value_of(parse_options(program, "", argv)[0], name) for argv in ([], [flag, *values]))
    written = here.strip("`")
    assert str(default) == written or KINDS[name](written) == default
    assert restored != default
    assert not values or str(restored) == values[0] or float(values[0]) == restored


def test_flags_that_restore_a_computation_exist():
    rows, flags = table_rows(COMPUTATIONS), known_flags()
    assert len(rows) > 40 and set(re.findall(r"`(--[\w-]+)", COMPUTATIONS)) <= flags
