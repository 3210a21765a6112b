"""What a trained run says of images: the likeliest classes of each, as a table and as a picture.

python predict.py --run Output/ViT/Attention some.png folder_of_images
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # before other imports: no traceback of one that is interrupted
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import sys
from pathlib import Path

from options.parser import OneLineParser, number_type
from runs.streams import run_program

SHEET = 64  # images on the contact sheet, at most


def make_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="image files, and folders of them")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="output folder of a run, whose best.pt predicts")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.csv", help="the table (default: predictions.csv in the run's folder)"
    )
    count = number_type(int)
    parser.add_argument("--top", type=count, default=5, help="classes of each image, the likeliest first (default: 5)")
    parser.add_argument("--batch_size", type=count, default=64, help="images at a time (default: 64)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where (default: auto)")
    parser.add_argument("--overwrite", action="store_true", help="write over a table that is there")
    return parser


def list_images(paths: list[Path]) -> list[Path]:
    """The files among the paths, and the image files in the folders and below. Raises ValueError for a path with none."""
    from readers.files import IMAGE_SUFFIXES

    found = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        images = [file for file in inside if file == path or (file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())]
        if not path.exists() or not images:
            raise ValueError(f"{path}: " + ("no image files in this folder" if path.exists() else "there is no such file"))
        found += images
    return found


def class_names(run: Path, classes: int) -> list[str]:
    """Those that the run noted, else numbers."""
    try:
        names = json.loads((run / "summary.json").read_text(encoding="utf-8"))["class_names"]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    return names if len(names) == classes else [f"class {number}" for number in range(classes)]


def predict(run: Path, files: list[Path], device: str, batch_size: int, top: int) -> tuple[list[dict], list]:
    """A row for each file, and the first pictures. Raises ValueError without a run, DataError for a broken image."""
    import torch

    from dataset import read_image
    from experiments.trained import as_picture, load_model, read_options
    from runs.devices import pick_device
    from runs.progress import Progress

    options = read_options(run)
    model, place = load_model(run, options), pick_device(device)
    model.to(place)
    names = class_names(run, options.model.num_classes)
    rows, pictures = [], []
    with Progress("predicting", len(files)) as progress, torch.inference_mode():
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            images = torch.stack([read_image(file, options.data) for file in part])
            pictures += [as_picture(image, options.data.dataset) for image in images[: SHEET - len(pictures)]]
            shares, order = model(images.to(place)).float().softmax(dim=1).topk(min(top, len(names)), dim=1)
            for file, of_file, classes in zip(part, shares.tolist(), order.tolist(), strict=True):
                row = {"file": str(file)}
                for rank, (share, number) in enumerate(zip(of_file, classes, strict=True), 1):
                    row |= {f"class_{rank}": names[number], f"probability_{rank}": round(share, 6)}
                rows.append(row)
            progress.advance(len(part))
            if progress.due:
                progress.show()
    return rows, pictures


def draw_sheet(rows: list[dict], pictures: list):
    """The first images, each with its likeliest classes."""
    from matplotlib.figure import Figure

    from experiments.pictures import show_picture

    columns = min(8, len(pictures))
    lines = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes:
        axis.axis("off")
    for axis, row, picture in zip(axes, rows, pictures, strict=False):
        axis.axis("on")
        show_picture(axis, picture)
        said = [(row[f"class_{rank}"], row[f"probability_{rank}"]) for rank in (1, 2, 3) if f"class_{rank}" in row]
        axis.set_title("\n".join(f"{name[:18]} {100 * share:.0f} %" for name, share in said), fontsize=7)
        axis.set_xlabel(Path(row["file"]).name[:24], fontsize=6)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    output = args.output or args.run / "predictions.csv"
    sheet = output.with_suffix(".png")
    for name in ("top", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if output.suffix.lower() != ".csv":
        parser.error(f"--output {output} is not a .csv file, which is what is written")
    if there := [path for path in (output, sheet) if path.exists() and not args.overwrite]:
        parser.error(f"--output {there[0]} is there already; use another name, or --overwrite")
    try:
        if not (args.run / "config.yaml").is_file():  # at once, before torch is imported
            raise ValueError(f"--run {args.run} holds no run: there is no config.yaml in it")
        files = list_images(args.images)
        from readers.images import DataError
        from runs import RunError
        from runs.files import as_csv, as_png, check_writable, write_atomically

        try:
            check_writable(output.parent, "--output")
            rows, pictures = predict(args.run, files, args.device, args.batch_size, args.top)
        except (DataError, RunError) as error:
            raise ValueError(str(error)) from None
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, as_csv(rows))
        write_atomically(sheet, as_png(draw_sheet(rows, pictures)))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    for row in rows[:10]:
        print(f"{row['file']}: {row['class_1']} {100 * row['probability_1']:.1f} %")
    print(f"{len(rows)} images; results are in {output} and {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
