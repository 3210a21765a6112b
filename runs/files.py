"""Atomic writes, tables as CSV, figures as PNG, PDF and SVG, checks before a run begins."""

import contextlib
import csv
import functools
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from options.reading import path_problem
from runs import RunError, Stopped


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[io.BufferedWriter]:
    """Open a file that replaces `path` once it is complete: a reader sees the old file or the new one, never a part.

    A temporary file in the same folder is flushed to disk, then renamed. Raises Stopped.
    """
    # The process id keeps two processes that write the same file from sharing a temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power failure may leave the new name with no content
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save turns an OSError (a full disk) into a RuntimeError that has it as its context.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise Stopped(f"{path} cannot be written ({cause.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Flush the entries of a folder, so that a rename survives a power failure; not every file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Delete the temporary files that `atomic_file` leaves, of this name, when a process is killed while it writes."""
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a complete file as `atomic_file` does. Raises Stopped."""
    with atomic_file(path) as file:
        file.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


def as_csv(rows: list[dict], columns: list[str] | None = None) -> str:
    """Return a table with a header; by default the first row names its columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FIGURE_SUFFIXES = (".png", ".pdf", ".svg")


def as_figure(figure, suffix: str = ".png") -> bytes:
    """Encode a matplotlib figure in the format of a suffix, one of FIGURE_SUFFIXES in any case."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(paper_style()):
        figure.savefig(buffer, format=suffix.lower().removeprefix("."))
    return buffer.getvalue()


# Fonts that systems have for Chinese, Japanese and Korean; matplotlib's own font has no such letters.
CJK_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAGothic",
    "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip


@functools.cache
def figure_fonts() -> list:
    """Return the fonts of figures: matplotlib's own, and those above that this machine has."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    names = ["DejaVu Sans", *(name for name in CJK_FONTS if name in there)]
    return [font_manager.get_font(font_manager.findfont(name)) for name in names]


def paper_style() -> dict:
    """Return settings of matplotlib for figures in a paper: texts of 7 points that take dollar signs literally, and 200 dpi.

    Texts stay texts in an SVG, and in a PDF with TrueType fonts, as publishers require.
    """
    return {
        "font.family": [font.family_name for font in figure_fonts()],
        "font.size": 7,
        "axes.titlesize": "medium",
        "figure.dpi": 200,
        "legend.frameon": False,
        "lines.linewidth": 1,
        "lines.markersize": 4,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "text.parse_math": False,
    }


@functools.cache
def _drawable_letter(letter: str) -> str:
    if any(font.get_char_index(ord(letter)) for font in figure_fonts()):
        return letter
    return letter.encode("unicode_escape").decode()


def drawable(name: str, most: int | None = None) -> str:
    """Return the first letters of a class, file or run's name as figures show them: without a font, as escapes."""
    return "".join(map(_drawable_letter, name))[:most]


def check_writable(folder: Path, flag: str) -> None:
    """Raise RunError, which names `flag`, if a folder cannot be created or written to. Leaves nothing behind."""
    if wrong := path_problem(str(folder)):
        raise RunError(f"{flag} {folder}: {wrong}")
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    # Permission bits do not tell (root, read-only mounts, quotas): create something.
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise RunError(f"{flag} {folder}: {existing} cannot be written to ({error.strerror})") from None
