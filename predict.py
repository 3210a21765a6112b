"""Predict images with a trained run: the likeliest classes of each, as a table and a contact sheet.

python predict.py --run Output/ViT/Attention some.png folder_of_images
"""

import signal

if __name__ == "__main__":  # before other imports: no traceback of an interrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import sys
from pathlib import Path

from options.parser import OneLineParser, nonempty_path, number_type
from options.reading import is_hidden
from options.trust import trusting
from runs.streams import run_program

SHEET = 64  # most images on the contact sheet


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "images", nargs="+", type=nonempty_path, metavar="IMAGE|FOLDER", help="image files, and folders of them"
    )
    parser.add_argument(
        "--run", type=nonempty_path, required=True, metavar="DIR", help="output folder of a run, whose best.pt predicts"
    )
    parser.add_argument(
        "--output", type=nonempty_path, metavar="FILE.csv", help="table (default: predictions.csv in the run's folder)"
    )
    count = number_type(int, low=1)
    parser.add_argument("--top", type=count, default=5, help="classes per image, the likeliest first (default: 5)")
    parser.add_argument("--batch_size", type=count, default=64, help="images at a time (default: 64)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="device (default: auto)")
    parser.add_argument("--trust_code", action="store_true", help="run the custom mixer's file, whoever wrote it")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing table")
    return parser


def list_images(paths: list[Path]) -> list[Path]:
    """List the files among the paths, and the image files in folders and below. Raises ValueError for a path without any."""
    from readers.folders import IMAGE_SUFFIXES

    found, skipped = [], 0
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        visible = [file for file in files if not any(map(is_hidden, file.relative_to(path).parts))]
        skipped, files = skipped + len(files) - len(visible), visible
        images = [path] if path.is_file() else files
        if not images:
            raise ValueError(f"{path}: " + ("no image files in this folder" if path.exists() else "there is no such file"))
        found += images
    if skipped:
        print(f"warning: {skipped} images in hidden or system entries are skipped", file=sys.stderr)
    return found


def class_names(run: Path, classes: int) -> list[str]:
    """Return the names that the run noted, or numbers if it noted none. Raises ValueError if best.pt has others."""
    from experiments.trained import check_classes

    try:
        names = json.loads((run / "summary.json").read_text(encoding="utf-8"))["class_names"]
    except (OSError, ValueError, KeyError):
        names = []
    if names:
        check_classes(run, names)
    return names if len(names) == classes else [f"class {number}" for number in range(classes)]


def predict(run: Path, files: list[Path], device: str, batch_size: int, top: int) -> tuple[list[dict], list]:
    """Predict image files: one row of the table per file, and the first SHEET images as matplotlib shows them.

    Raises:
        ValueError: The folder holds no run that can be loaded.
        DataError: An image is damaged.
    """
    import torch

    from dataset import read_image
    from experiments.trained import as_picture, load_model, read_options
    from runs.devices import pick_device
    from runs.progress import Progress

    options = read_options(run)
    device = pick_device(device)
    model = load_model(run, options).to(device)
    names = class_names(run, options.model.num_classes)
    rows, pictures = [], []
    with Progress("predicting", len(files)) as progress, torch.inference_mode():
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            images = torch.stack([read_image(file, options.data) for file in batch])
            pictures += [as_picture(image, options.data) for image in images[: SHEET - len(pictures)]]
            shares, classes = model(images.to(device)).float().softmax(dim=1).topk(min(top, len(names)), dim=1)
            for file, of_image, numbers in zip(batch, shares.tolist(), classes.tolist(), strict=True):
                row = {"file": str(file)}
                for rank, (share, number) in enumerate(zip(of_image, numbers, strict=True), 1):
                    row |= {f"class_{rank}": names[number], f"probability_{rank}": round(share, 6)}
                rows.append(row)
            progress.advance(len(batch))
            if progress.due:
                progress.show()
    return rows, pictures


def draw_sheet(rows: list[dict], pictures: list):
    """Draw a contact sheet: each image with its three likeliest classes."""
    from experiments.panels import PAGE, make_panels
    from experiments.pictures import show_picture
    from runs.files import drawable

    figure, axes = make_panels(len(pictures), min(6, len(pictures)), PAGE / 6, 1.7)
    for axis, row, picture in zip(axes, rows, pictures, strict=False):
        show_picture(axis, picture)
        likeliest = [(row[f"class_{rank}"], row[f"probability_{rank}"]) for rank in (1, 2, 3) if f"class_{rank}" in row]
        axis.set_title("\n".join(f"{drawable(name, 14)} {100 * share:.0f} %" for name, share in likeliest), fontsize=6)
        axis.set_xlabel(drawable(Path(row["file"]).name, 24), fontsize=5)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    table = args.output or args.run / "predictions.csv"
    sheet = table.with_suffix(".png")
    from runs import DataError, RunError
    from runs.files import as_csv, as_figure, check_writable, write_atomically

    try:
        if table.suffix.lower() != ".csv":
            raise ValueError(f"--output {table} is not a .csv file")
        for path in (table, sheet):
            if path.exists() and not args.overwrite:
                raise ValueError(f"--output {path} exists; use another name, or --overwrite")
        files = list_images(args.images)
        check_writable(table.parent, "--output")
        with trusting(args.trust_code):
            rows, pictures = predict(args.run, files, args.device, args.batch_size, args.top)
        table.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(table, as_csv(rows))
        write_atomically(sheet, as_figure(draw_sheet(rows, pictures)))
    except (ValueError, OSError, DataError, RunError) as error:
        parser.error(" ".join(str(error).split()))
    for row in rows[:10]:
        print(f"{row['file']}: {row['class_1']} {100 * row['probability_1']:.1f} %")
    print(f"{len(rows)} images; results are in {table} and {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
