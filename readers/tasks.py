"""Generated tasks: images of S x S cells, each of which isolates one ability of a mixer; docs/abilities.md shows them.

A cell has 4 x 4 pixels. It is empty, or holds a pattern in a color, and one or two cells are marked. Cells are first drawn as
slots: slot 0 is the marked cell, slot 1 its partner, and so on; `places` (B, N) says which cell of the image each slot is.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from options.data import CELL, DataConfig
from readers.files import Images, Source
from utils import uniform

COLORS = 4
SYMBOLS = {"recall": 6}  # patterns by default, where not 8: with 8 it takes attention several times as many steps
STREAM = 1000  # of random numbers: far from the ones that augmentation draws from
SIZES = {"train": 50_000, "val": 5_000, "test": 5_000}
CLASS_NAMES = {
    "locate": [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")],
    "count": [str(number) for number in range(8)],
    "duplicate": ["all different", "two alike"],
    "joined": ["apart", "joined"],
}


class Scene(NamedTuple):
    """Cells of B images: pattern, color, filled and marked, (B, N) each, and the class (B,)."""

    pattern: np.ndarray
    color: np.ndarray
    filled: np.ndarray
    marked: np.ndarray
    label: np.ndarray


class Draws:
    """Random numbers for the images `index` (B,), each row a function of (seed, part, index)."""

    def __init__(self, seed: int, part: str, index: np.ndarray):
        self.seed, self.part, self.index, self.stream = seed, part, torch.from_numpy(index), STREAM

    def numbers(self, n: int) -> np.ndarray:
        """Draw (B, n) numbers in [0, 1)."""
        self.stream += 1
        return uniform(self.seed, list(SIZES).index(self.part), self.index, n, self.stream).double().numpy()

    def below(self, high, n: int = 1) -> np.ndarray:
        """Draw (B, n) whole numbers from 0 to high - 1; `high` may differ by image, (B, 1)."""
        return (self.numbers(n) * high).astype(np.int64)

    def order(self, n: int, *first: np.ndarray) -> np.ndarray:
        """Draw a random order (B, n) of 0 to n - 1 that begins with the numbers in `first`, (B, 1) each."""
        key = self.numbers(n)
        for place, number in enumerate(first):
            np.put_along_axis(key, number, place - len(first), 1)
        return key.argsort(axis=1, kind="stable")


# ---------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------


def draw_scene(task: str, draws: Draws, size: int, symbols: int, full: bool) -> Scene:
    """Draw the cells of a batch of images; with `full` all cells are filled, else a log-uniform number of them.

    With a uniform number of distractors, attention would stay at chance for thousands of steps.
    """
    if task == "joined":
        return draw_joined(draws, size, symbols, full)
    cells, slots = size**2, np.arange(size**2)
    pattern, color = draws.below(symbols, cells), draws.below(COLORS, cells)
    # From 8 cells on, all classes of `count` are possible.
    least = draws.below(5) + 2 if task == "duplicate" else np.array([[{"find": 1, "locate": 1, "count": 8}.get(task, 2)]])
    count = np.full_like(pattern[:, :1], cells) if full else log_uniform(draws, least, cells)
    partners = partner_cells(task, size)
    first = ()
    if task in ("beside", "opposite"):
        partner = partners[draws.below(len(partners))]
        first = (partner - 1 if task == "beside" else cells - 1 - partner), partner
    places = draws.order(cells, *first)
    label = color[:, 0]
    if task == "locate":
        label = places[:, 0] // size * 3 // size * 3 + places[:, 0] % size * 3 // size
    if task in ("beside", "opposite", "recall"):
        color[:, 1:] = deal(draws, ((slots < count) & np.isin(places, partners))[:, 1:])
        label = color[:, 1]
    if task == "recall":  # the other slots have other patterns
        pattern[:, 1] = pattern[:, 0]
        pattern[:, 2:] = (pattern[:, :1] + 1 + draws.below(symbols - 1, cells - 2)) % symbols
    if task == "count":
        others = draws.below(np.minimum(8, count))
        # The eight patterns have 1 to 8 cells, in some order. That fills 6 x 6 cells: all images have one histogram.
        ends = (draws.order(8, others) + 1).cumsum(axis=1)
        run = (ends[:, None] <= slots[:, None]).sum(axis=2)
        pattern = np.take_along_axis(draws.order(symbols), np.minimum(run, min(symbols, 8) - 1), 1)
        label = others[:, 0]
    if task == "duplicate":  # `least` cells are of color 0
        label = draws.below(2)[:, 0]
        own = slots < least
        color = np.where(own, 0, 1 + draws.below(COLORS - 1, cells))
        distinct = np.take_along_axis(draws.order(symbols), np.minimum(slots, symbols - 1)[None].repeat(len(own), 0), 1)
        distinct[:, 1] = np.where(label, distinct[:, 0], distinct[:, 1])
        pattern = np.where(own, distinct, pattern)
    cell_of = places.argsort(axis=1)
    marked = np.broadcast_to((slots == 0) & (task != "duplicate"), pattern.shape)
    parts = (np.take_along_axis(part, cell_of, 1) for part in (pattern, color, slots < count, marked))
    return Scene(*parts, label)


def log_uniform(draws: Draws, least: np.ndarray, most: int) -> np.ndarray:
    """Draw (B, 1) whole numbers from `least` to `most` with uniform logarithms."""
    return np.minimum((least * ((most + 1) / least) ** draws.numbers(1)).astype(np.int64), most)


def partner_cells(task: str, size: int) -> np.ndarray:
    """Return the cells that can be the partner of the marked one."""
    row, column = np.divmod(np.arange(size**2), size)
    if task == "beside":
        return np.flatnonzero(column > 0)
    if task == "opposite":  # the outer ring: from the middle, two windows of 3 x 3 reach the opposite cell
        return np.flatnonzero((np.minimum(row, column) == 0) | (np.maximum(row, column) == size - 1))
    return np.arange(size**2)


def deal(draws: Draws, could: np.ndarray) -> np.ndarray:
    """Deal colors (B, n) to slots, equally often among the ones that `could` (B, n) be the partner: no majority to guess."""
    rank = (~could).argsort(axis=1, kind="stable").argsort(axis=1)
    count = could.sum(axis=1, keepdims=True)
    turn = np.where(could, (rank + draws.below(count)) % count, rank)
    return (turn + draws.below(COLORS)) % COLORS


# ---------------------------------------------------------------------------------------------------------------
# Paths
# ---------------------------------------------------------------------------------------------------------------


def around(grid: np.ndarray) -> list[np.ndarray]:
    """Return the four neighbors of each cell of (B, S, S), zero outside."""
    padded = np.pad(grid, ((0, 0), (1, 1), (1, 1)))
    return [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]]


def reach(start: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Return the cells (B, S, S) that a path of filled cells joins with `start`."""
    reached, before = start & filled, None
    while before is None or (reached != before).any():
        before, reached = reached, (reached | np.logical_or.reduce(around(reached))) & filled
    return reached


def draw_joined(draws: Draws, size: int, symbols: int, full: bool) -> Scene:
    """Draw scenes in pairs that differ in one mark only: images 2 i and 2 i + 1 have the same cells and the same first mark.

    Second marks have the same distance from the first, 2 to 5 steps, equally many filled neighbors, and the same distances from
    the borders: only the path tells the classes apart. Unless `full`, the filled cells lie in a window of 4 or more a side.
    """
    pair, member = np.divmod(draws.index.numpy(), 2)
    pairs, inverse = np.unique(pair, return_inverse=True)
    cells = size**2
    filled, marks = np.zeros((len(pairs), cells), bool), np.zeros((len(pairs), 3), np.int64)
    left, attempts = np.arange(len(pairs)), Draws(draws.seed, draws.part, pairs)
    while len(left):  # of 8 draws, about one has such a pair
        attempts.index = torch.from_numpy(8 * pairs[left, None] + np.arange(8)).flatten()
        drawn, places, found = draw_pairs(attempts, size, full)
        first = 8 * np.arange(len(left)) + found.reshape(-1, 8).argmax(axis=1)
        filled[left], marks[left] = drawn[first], places[first]
        left = left[~found[first]]
    filled, marks = filled[inverse], marks[inverse]
    second = np.take_along_axis(marks, 1 + member[:, None], 1)
    marked = (np.arange(cells) == marks[:, :1]) | (np.arange(cells) == second)
    return Scene(draws.below(symbols, cells), draws.below(COLORS, cells), filled, marked, member)


def draw_pairs(draws: Draws, size: int, full: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw filled cells (B, N) and three of them (B, 3): a start, one apart and one joined; and where there are such (B,)."""
    cell, everyone = np.arange(size**2), np.arange(len(draws.index))
    row, column = cell // size, cell % size
    side = size if full else 4 + draws.below(size - 3)
    top, left = draws.below(size - side + 1), draws.below(size - side + 1)
    window = (row >= top) & (row < top + side) & (column >= left) & (column < left + side)
    filled = window & (draws.numbers(size**2) < 0.35 + 0.3 * draws.numbers(1))
    start = (filled * draws.numbers(size**2)).argmax(axis=1)
    grid = filled.reshape(-1, size, size)
    joined = reach((cell == start[:, None]).reshape(grid.shape), grid).reshape(filled.shape)
    degree = sum(part.astype(int) for part in around(grid)).reshape(filled.shape)
    distance = abs(row - row[start][:, None]) + abs(column - column[start][:, None])
    inward = np.sort([np.minimum(row, size - 1 - row), np.minimum(column, size - 1 - column)], axis=0)
    usable = filled & (degree > 0) & (distance >= 2) & (distance <= 5)
    kind = np.where(usable, ((inward[0] * size + inward[1]) * 6 + distance) * 5 + degree, 0).astype(np.int16)
    matched = ((kind[:, :, None] == kind[:, None]) & joined[:, None]).any(axis=2)
    apart = ((usable & ~joined & matched) * draws.numbers(size**2)).argmax(axis=1)
    alike = joined & (kind == kind[everyone, apart][:, None])
    end = (alike * draws.numbers(size**2)).argmax(axis=1)
    found = (usable & ~joined & matched)[everyone, apart]
    return filled, np.stack((start, apart, end), axis=1), found


# ---------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------


def make_patterns() -> np.ndarray:
    """Return 15 patterns (15, 4, 4) of 0 and 1, half of it ones: two-dimensional Walsh functions, so orthogonal."""
    pair = np.array([[1, 1], [1, -1]])
    walsh = np.kron(pair, pair)
    return (np.einsum("ik,jl->ijkl", walsh, walsh).reshape(16, CELL, CELL)[1:] > 0).astype(float)


def make_hues() -> np.ndarray:
    """Return four colors (4, 3) of equal brightness, a quarter turn apart: red, green, cyan, violet."""
    turn = np.pi / 2 * np.arange(COLORS)[:, None]
    return 0.5 + 0.6 * (np.cos(turn) * np.array([2, -1, -1]) / 6**0.5 + np.sin(turn) * np.array([0, 1, -1]) / 2**0.5)


PATTERNS, HUES = make_patterns(), make_hues()
MARK, INK = 0.4, 0.6  # added to a marked cell, and brightness of the patterns, whose pixels reach 1 together


def render(scene: Scene, size: int) -> np.ndarray:
    """Return the images (B, 3, 4 S, 4 S) uint8 of scenes."""
    kinds = INK * HUES[:, None, :, None, None] * PATTERNS[:, None]  # (4, 15, 3, 4, 4)
    kinds = np.concatenate((kinds.reshape(-1, 3, CELL, CELL), np.zeros((1, 3, CELL, CELL))))  # the last one is empty
    table = np.rint(255 * np.concatenate((kinds, kinds + MARK))).astype(np.uint8)
    kind = np.where(scene.filled, scene.color * len(PATTERNS) + scene.pattern, len(kinds) - 1) + scene.marked * len(kinds)
    cells = table[kind].reshape(-1, size, size, 3, CELL, CELL)
    return np.ascontiguousarray(cells.transpose(0, 3, 1, 4, 2, 5).reshape(-1, 3, CELL * size, CELL * size))


def generate(task: str, seed: int, part: str, index: np.ndarray, size: int = 6, symbols: int | None = None) -> Images:
    """Generate the images `index` (B,) of a part of a task, each a function of (seed, part, index).

    Args:
        task: a name in `options.data.TASKS`.
        part: train, val or test. Only training images leave cells empty.
        size: cells along a side.
        symbols: number of patterns, 2 to 15.
    """
    symbols = symbols or SYMBOLS.get(task, 8)
    scene = draw_scene(task, Draws(seed, part, index), size, symbols, full=part != "train")
    return Images(render(scene, size), scene.label)


def class_names(task: str) -> list[str]:
    return CLASS_NAMES.get(task, ["red", "green", "cyan", "violet"])


def read_task(config: DataConfig, parts: tuple[str, ...]) -> Source:
    """Generate a task's training, validation and test images, or the test images only."""
    task = config.dataset.removeprefix("task_")
    wanted = [part for part in SIZES if part in parts or (part == "val" and "train" in parts)]
    made = {part: generate(task, 0, part, np.arange(SIZES[part]), config.task_size, config.task_symbols) for part in wanted}
    hashes = {
        part: hashlib.sha256(images.data.tobytes() + images.labels.tobytes()).hexdigest() for part, images in made.items()
    }
    return Source(made, class_names(task), hashes=hashes)
