"""Classify images with an exported model, with NumPy, Pillow and onnxruntime only.

python vit_main.py --dataset digits --resize 8 --patch_size 2 --num_epochs 5 --export model.onnx
python examples/run_onnx.py model.onnx image.png

The file describes the preprocessing in its metadata. The probabilities are those of predict.py.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def read(path: str, how: dict) -> np.ndarray:
    """Return the pixels of an 8-bit image as the model sees them: (channels, height, width) float32."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB").convert(how["mode"])
    (height, width), (rows, columns) = how["size"], how["cover"]
    if how["crop"] == "squash":
        rows, columns = height, width
    elif rows * image.width >= columns * image.height:
        columns = rows * image.width // image.height
    else:
        rows = columns * image.height // image.width
    image = image.resize((columns, rows), FILTERS[how["interpolation"]])
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = pixels.reshape(height, width, -1)  # gray has one channel, and as many as there are means below
    return ((pixels - np.float32(how["mean"])) / np.float32(how["std"])).transpose(2, 0, 1)


def main(model: str, *images: str) -> None:
    session = onnxruntime.InferenceSession(model)
    notes = session.get_modelmeta().custom_metadata_map
    names, how = json.loads(notes["class_names"]), json.loads(notes["preprocessing"])
    for path in images:
        logits = session.run(["logits"], {"images": read(path, how)[None]})[0][0]
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = int(shares.argmax())
        print(f"{path}: {names[best]} {shares[best]:.5f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
