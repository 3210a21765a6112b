"""Sweeps: a grid of runs from a YAML file, on this machine or a cluster, with a summary table and plots.

python run_experiments.py configs/sweeps/mixers.yaml --jobs 2
python run_experiments.py configs/sweeps/mixers.yaml --set seed=0,1,2 --set num_epochs=3 --dry_run
python run_experiments.py configs/sweeps/paper/vit_k.yaml --scale 0.05 --published docs/published.csv
"""

import argparse
import contextlib
import shlex
import signal
import sys
from pathlib import Path

from experiments.points import Point, check_points, find_config, leave_out_unread, name_points, read_sweep
from experiments.published import match, read_published
from experiments.report import NOTHING, Beside, is_finished, write_summary
from experiments.runner import Sweep, submit, visible_gpus
from experiments.scaling import scale_points
from experiments.selection import FOLDER, MEASURES, check_validation, choose, first_stage, read_selection
from options.parser import OneLineParser, nonempty_path, number_type, parse_yaml
from runs import RunError
from runs.files import check_writable
from runs.streams import run_program


def make_parser() -> OneLineParser:
    several = number_type(int, 1, 10**4)
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="program, options, grid and seed; see configs/sweeps")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="set or replace an option or an axis of the grid; repeatable",
    )
    parser.add_argument(
        "--output_dir",
        type=nonempty_path,
        help="folder of the sweep (default: ./Output/sweeps/<name of the file>, with the suffix _scale-<s> under --scale)",
    )
    parser.add_argument(
        "--scale",
        type=number_type(float),
        help="run the sweep with this share of its epochs and images, such as 0.05",
    )
    parser.add_argument(
        "--published",
        type=nonempty_path,
        metavar="FILE.csv",
        help="published numbers to put beside ours in the summary, such as docs/published.csv",
    )
    parser.add_argument(
        "--select",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="choose a value for each row on validation images, in a first stage with seeds of its own; repeatable",
    )
    parser.add_argument(
        "--by", choices=tuple(MEASURES), help="measure of the best epoch that --select goes by (default: val_top1)"
    )
    parser.add_argument(
        "--baseline", metavar="LAYER", help="add differences to this layer, paired by seed, with intervals and p-values"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the points and stop")
    parser.add_argument(
        "--gpus_per_run", type=several, default=1, help="GPUs of one run; more than 1 are started by torchrun (default: 1)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=several, default=1, help="runs at a time; they share the cores (default: 1)")
    where.add_argument("--gpus", type=several, help="GPUs to use, one run on each (or on --gpus_per_run of them) at a time")
    where.add_argument(
        "--slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="submit to SLURM through submitit (pip install submitit) with its parameters: timeout_min=600 slurm_partition=gpu "
        "gpus_per_node=1 slurm_array_parallelism=8",
    )
    return parser


def slurm_parameters(words: list[str]) -> dict:
    parameters = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            parameters[name] = parse_yaml(text)
        except ValueError:
            name = ""
        if not name or not equals:
            raise ValueError(f"--slurm {word!r} is not name=value with a value that YAML can read")
    return parameters


def show_points(points: list[Point], folder: Path) -> None:
    width = max(len(point.name) for point in points)
    for point in points:
        state = "finished" if is_finished(point, folder) else "begun" if (folder / point.name / "last.pt").exists() else ""
        print(f"{point.name:<{width}}  {state:<8}  {point.program} {shlex.join(point.argv(folder)[:-3])}".rstrip())
    print(f"{len(points)} runs in {folder}")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    small = "" if args.scale is None else f"_scale-{args.scale:g}"  # so that small runs and whole ones never share a folder
    folder = args.output_dir or Path("Output/sweeps") / f"{Path(args.sweep).stem}{small}"
    scaled, stage, undecided = "", [], []
    try:
        if args.gpus_per_run > 1 and args.gpus is None and args.slurm is None:
            raise ValueError(f"--gpus_per_run {args.gpus_per_run} goes with --gpus or --slurm")
        if args.gpus and args.gpus < args.gpus_per_run:
            raise ValueError(f"--gpus_per_run {args.gpus_per_run} is more than --gpus {args.gpus}")
        points, left_out = leave_out_unread(find_config(name_points(*read_sweep(args.sweep, args.set)), args.sweep))
        if args.scale is not None:
            points, scaled = scale_points(points, args.scale, folder)
        selection = read_selection(args.sweep, args.select, args.by)
        if selection:
            stage = first_stage(points, selection)
            check_validation(check_points(stage, folder / FOLDER))
            points, undecided = choose(points, folder, selection)
        beside = check_results(points, folder, args)
        parameters = None if args.slurm is None else slurm_parameters(args.slurm)
        if args.gpus and not args.dry_run and args.gpus > len(visible_gpus()):
            raise ValueError(f"--gpus {args.gpus} is more than the {len(visible_gpus())} GPUs that can be used here")
        if not args.dry_run:
            check_writable(folder, "--output_dir")
    except (RunError, ValueError) as error:
        parser.error(str(error))
    if left_out:
        parser.warn(left_out)
    if args.published is not None and not beside.published:
        parser.warn(f"--published {args.published}: none of its rows matches a run of this sweep")
    if scaled:
        print(scaled, flush=True)
    if args.dry_run:
        if stage:
            show_points(stage, folder / FOLDER)
            print(f"{len(undecided)} of the runs below have no choice yet and are shown with the first values")
        show_points(points, folder)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if parameters is not None:
        if undecided:
            print("this submits the first stage; once its jobs have ended, the same command submits the second")
            return run_on_cluster(stage, folder / FOLDER, parameters, args.gpus_per_run, NOTHING, parser)
        return run_on_cluster(points, folder, parameters, args.gpus_per_run, beside, parser)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if undecided:
            run_here(stage, folder / FOLDER, args, NOTHING)
            points, undecided = choose(points, folder, selection)
            points = [point for point in points if point.name not in undecided]
            beside = check_results(points, folder, args)
        failed = undecided + run_here(points, folder, args, beside)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except ValueError as error:
        parser.error(str(error))
    is_written = write_summary(points, folder, beside=beside)
    if is_written:
        print((folder / "summary.md").read_text(encoding="utf-8"))
    if failed:
        print(f"{len(failed)} of {len(points)} failed: {', '.join(failed)}", file=sys.stderr)
    print(f"results are in {folder}")
    return 1 if failed or not is_written else 0


def check_results(points: list[Point], folder: Path, args: argparse.Namespace) -> Beside:
    """Check the points whose results make the tables; return the numbers to put beside them. Raises ValueError."""
    options = check_points(points, folder)
    layers = dict.fromkeys(str(point.varying.get("layer")) for point in points)
    if args.baseline is not None and args.baseline not in layers:
        raise ValueError(f"--baseline {args.baseline} is no row of this sweep; its layers are {', '.join(layers)}")
    published = {} if args.published is None else match(read_published(args.published, points), options)
    return Beside(published, args.baseline)


def run_here(points: list[Point], folder: Path, args: argparse.Namespace, beside: Beside) -> list[str]:
    """Run the points on this machine; return the names of those that failed."""
    from tqdm import tqdm

    slots = args.gpus // args.gpus_per_run if args.gpus else args.jobs
    sweep = Sweep(points, folder, slots, bool(args.gpus), args.gpus_per_run, beside=beside)
    with tqdm(total=len(points), unit="run", disable=None) as progress:
        sweep.run(progress)
    return sweep.failed


def run_on_cluster(
    points: list[Point],
    folder: Path,
    parameters: dict,
    gpus_per_run: int,
    beside: Beside,
    parser: argparse.ArgumentParser,
) -> int:
    try:
        jobs = submit(points, folder, parameters, gpus_per_run, beside)
    except ModuleNotFoundError:
        parser.error("--slurm needs the package submitit: pip install submitit")
    except (RuntimeError, NameError, TypeError, ValueError) as error:  # no sbatch here, or a parameter that it does not know
        for made in (folder / "jobs", folder):
            with contextlib.suppress(OSError):  # it holds something
                made.rmdir()
        parser.error(f"--slurm: {error}")
    print(f"submitted {len(jobs)} jobs; their logs are in {folder / 'jobs'}, and the summary in {folder} grows as they end")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
