"""Fingerprint of a data set, which checkpoints and summary.json hold: class names, numbers of images, hashes of file lists."""

from typing import NamedTuple


class Difference(NamedTuple):
    """Difference between data and the data that a checkpoint was trained on."""

    text: str
    of_classes: bool = False  # their names or order: labels mean something else
    of_numbers: bool = False  # of images


def make_fingerprint(class_names: list[str], counts: dict[str, list[int]], hashes: dict[str, str]) -> dict:
    """Return the fingerprint as plain values; counts (images per class) and hashes by part."""
    return {"class_names": list(class_names), "images": counts, "files": dict(hashes)}


def noted_classes(state: dict) -> list[str] | None:
    """Return the class names that a checkpoint holds, None if it holds none."""
    noted = state.get("data")
    names = noted.get("class_names") if isinstance(noted, dict) else None
    return names if isinstance(names, list) else None


def compare(noted: dict | None, here: dict, parts: tuple[str, ...] = ("train", "test")) -> Difference | None:
    """Return the first difference between two fingerprints in these parts of the data, if there is one."""
    if not isinstance(noted, dict):
        return None
    before, now = noted["class_names"], here["class_names"]
    if before != now:
        return Difference(describe_classes(before, now), of_classes=True)
    for part in parts:
        then, there = (one["images"].get(part) for one in (noted, here))
        if None not in (then, there) and then != there:
            name = next(name for name, *pair in zip(now, then, there, strict=True) if pair[0] != pair[1])
            was, has = then[now.index(name)], there[now.index(name)]
            total = f"{sum(then):,} {part} images, here {sum(there):,}"
            return Difference(f"{total} (first difference: class {name}, {was:,} and {has:,})", of_numbers=True)
        then, there = (one["files"].get(part) for one in (noted, here))
        if None not in (then, there) and then != there:
            return Difference(f"{part} images of other names or sizes")
    return None


def describe_classes(before: list[str], now: list[str]) -> str:
    """Describe two lists of class names by their first difference."""
    if len(before) != len(now):
        missing, new = ([name for name in one if name not in other] for one, other in ((before, now), (now, before)))
        groups = [(word, names) for word, names in (("without", missing), ("with", new)) if names]
        changes = [f"{word} {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for word, names in groups]
        return f"{len(before)} classes, here {len(now)} ({', '.join(changes)})"
    number = next(number for number, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
    return f"class {number} named {before[number]}, here {now[number]}"
