"""The explorer: one HTML file in which a reader points at a token and sees its neighbors, layer by layer and head by head.

`explorer.html` is the page without its data. The data are JSON: per run and layer the K neighbors of every token of every
image and their weights, one or two bytes each, deflated, as base64.
"""

import base64
import io
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.mixing import Mixing, record_run
from experiments.trained import Run, as_picture, load_runs

TEMPLATE = Path(__file__).with_name("explorer.html")
LARGEST = 5e6  # bytes; larger pages are hard to pass on
LARGEST_PNG = 64  # side of a picture that is kept pixel by pixel; larger ones are photographs


def explorer_page(folders: list[Path], images: int, pairs: int | None, data_path: str | None) -> str:
    """Return the page of one or several runs, side by side on the same test images.

    pairs: number kept per token in layers that mix all pairs; None: the K of the run. Raises ValueError for runs on other
    images than the first one, and for a run without neighbors and matrices to show.
    """
    runs = load_runs(folders, images, data_path)
    first = runs[0]
    page = {
        "dataset": first.options.data.dataset,
        "images": [
            {"src": _as_url(as_picture(image, first.options.data)), "label": first.class_names[label]}
            for image, label in zip(first.images, first.labels, strict=True)
        ],
        "runs": [_as_json(run, pairs or run.options.model.K) for run in runs],
    }
    text = json.dumps(page, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def _as_json(run: Run, pairs: int) -> dict:
    logits, found = record_run(run, pairs)
    path = run.folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    top1 = summary.get("best", {}).get("test_top1")
    return {
        "name": run.name,
        "layer": run.options.model.layer,
        "facts": "" if top1 is None else f"{top1:.1f} % of the test images",
        "predictions": [run.class_names[number] for number in logits.argmax(dim=1)],
        "layers": [pack_mixing(mixing) for mixing in found],
    }


def _as_url(picture: np.ndarray) -> str:
    file, kind = io.BytesIO(), "png" if max(picture.shape) <= LARGEST_PNG else "jpeg"
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file, kind, quality=90, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# ---------------------------------------------------------------------------------------------------------------
# Layers as JSON. Weights w are kept as bytes b: with t = (b - zero) / (255 - zero), w = scale * t * |t|; the square keeps
# small weights apart. `zero` is 0, or 128 where there are negative ones.
# ---------------------------------------------------------------------------------------------------------------


def pack_mixing(mixing: Mixing) -> dict:
    """Return a layer as JSON: index and weights (B, H, N, K), share (B, H, N), each as base64 of deflated bytes."""
    weights = mixing.weights.numpy()
    scale = float(np.abs(weights).max()) or 1.0
    zero = 128 if weights.min() < 0 else 0
    roots = np.sign(weights) * np.sqrt(np.abs(weights) / scale)
    index = mixing.index.numpy()
    index = np.where(index < 0, mixing.num_keys, index)  # absent
    images, heads, tokens, kept = index.shape
    return {
        "name": mixing.name,
        "rule": mixing.rule,
        "grid": mixing.grid,
        "padding": mixing.padding,
        "class_tokens": mixing.class_tokens,
        "shape": [images, heads, tokens, kept],
        "is_share": mixing.is_share,
        "bytes": 1 if mixing.num_keys < 256 else 2,
        "index": _as_text(index.astype("u1" if mixing.num_keys < 256 else "<u2")),
        "scale": scale,
        "zero": zero,
        "weights": _as_text((zero + roots * (255 - zero)).round().astype("u1")),
        "share": None if mixing.is_whole else _as_text((mixing.share.numpy() * 255).round().astype("u1")),
    }


def _as_text(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 9)).decode()
