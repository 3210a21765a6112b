"""Image files: damage that decoders pass over in silence, and a check before training that is paid for once."""

import io
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import allconvnet_main
from options.machine import cache_folder
from readers import images as image_files
from readers.images import check_image, check_images, decode_image
from runs import DataError
from runs import files as run_files

SOUND = [
    ("RGB", {}),
    ("RGB", {"progressive": True}),
    ("RGB", {"restart_marker_rows": 2}),
    ("RGB", {"subsampling": 0}),
    ("L", {}),
    ("CMYK", {}),
]


def photo(mode="RGB", size=(90, 70), seed=0, **how) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BOX).convert(mode).save(stream, "JPEG", quality=80, **how)
    return stream.getvalue()


def says(path) -> str:
    with pytest.raises(DataError) as caught:
        decode_image(str(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_data_error_crosses_processes_as_one_line():
    buffer = io.BytesIO(pickle.dumps(DataError("first\nsecond")))
    error = pickle.load(buffer)
    assert type(error) is DataError and str(error) == "first second"


# --- orientation --------------------------------------------------------------------------------------------------------


UPRIGHT = np.zeros((32, 48, 3), np.uint8)
UPRIGHT[:16, :16], UPRIGHT[:16, 16:], UPRIGHT[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# By EXIF's number, how to store an upright image so that the tag describes it.
STORED = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: np.rot90,
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, -1),
}


def save_tagged(path, image, orientation, **how):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(image)).save(path, exif=exif, **how)
    return str(path)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("suffix", "how"),
    [("jpg", {"quality": 100, "subsampling": 0}), ("png", {}), ("webp", {"lossless": True}), ("tiff", {})],
    ids=["jpeg", "png", "webp", "tiff"],
)
def test_images_are_upright_in_every_orientation_and_format(tmp_path, suffix, how, orientation):
    found = np.asarray(decode_image(save_tagged(tmp_path / f"i.{suffix}", STORED[orientation](UPRIGHT), orientation, **how)))
    assert found.shape == UPRIGHT.shape
    assert np.abs(found.astype(int) - UPRIGHT).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bits_of_gray_are_turned_too(tmp_path, suffix):
    gray = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    path = save_tagged(tmp_path / f"gray.{suffix}", STORED[6](gray), 6)
    assert np.array_equal(np.asarray(decode_image(path)), np.repeat((gray >> 8)[:, :, None], 3, axis=2))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientations_that_do_not_exist_and_damaged_exif_leave_an_image_as_it_is(tmp_path):
    assert np.array_equal(np.asarray(decode_image(save_tagged(tmp_path / "odd.png", UPRIGHT, 200))), UPRIGHT)
    Image.fromarray(UPRIGHT).save(tmp_path / "damaged.png", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fnothing")
    assert np.array_equal(np.asarray(decode_image(str(tmp_path / "damaged.png"))), UPRIGHT)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "how"), [one for one in SOUND if "progressive" not in one[1]])
@pytest.mark.parametrize("place", [0.5, 0.7, 0.95])
def test_a_jpeg_whose_data_ends_in_the_middle_is_named(mode, how, place, tmp_path):
    """PIL gives it a grey rest; the header and the last marker are as they should be."""
    raw = photo(mode, **how)
    path = tmp_path / "cut.jpg"
    path.write_bytes(raw[: int(place * len(raw))] + b"\xff\xd9")
    check_image(str(path))
    corner = np.asarray(Image.open(path))[-4:, -4:]
    assert ((corner == 128) | (corner == 127)).all()
    assert "ends early" in says(path)
    path.write_bytes(raw[: int(place * len(raw))] + b"\xff\xd9 and what a camera appends")
    with pytest.raises(DataError):
        check_image(str(path))


def segments(raw: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Marker and bytes of each segment of a JPEG, up to the start of its scan, and the rest."""
    found, place = [], 2
    while not found or found[-1][0] != 0xDA:
        end = place + 2 + int.from_bytes(raw[place + 2 : place + 4])
        found.append((raw[place + 1], raw[place:end]))
        place = end
    return found, raw[place:]


def edited(marker: int, edit) -> bytes:
    """A JPEG with every segment of this kind changed."""
    found, rest = segments(photo())
    return b"\xff\xd8" + b"".join(edit(segment) if kind == marker else segment for kind, segment in found) + rest


UNDECODABLE = {
    "no quantization table": (0xDB, lambda segment: b""),
    "a table that is not there": (0xC0, lambda segment: segment[:12] + b"\3" + segment[13:]),
    "lossless": (0xC0, lambda segment: b"\xff\xc3" + segment[2:]),
    "hierarchical": (0xC0, lambda segment: b"\xff\xc5" + segment[2:]),
    "Huffman codes of 255 a length": (0xC4, lambda segment: segment[:5] + b"\xff" * 16 + segment[21:]),
    "three Huffman codes of one bit": (0xC4, lambda segment: b"\xff\xc4\0\x16" + segment[4:5] + b"\3" + bytes(15) + b"\1\2\3"),
    "more pixels than the limit": (0xC0, lambda segment: segment[:5] + b"\x4e\x20" * 2 + segment[9:]),
}


@pytest.mark.parametrize("damage", UNDECODABLE)
def test_a_jpeg_that_cannot_be_decoded_is_named_before_training(damage, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(edited(0xC0, lambda segment: segment))
    check_image(str(path))
    path.write_bytes(edited(*UNDECODABLE[damage]))
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        check_image(str(path))
    assert str(path) in str(caught.value) and str(caught.value) == says(path)


def test_pixels_beyond_the_limit_of_a_warning_are_one_line(tmp_path, monkeypatch, capsys):
    _, files = files_in(tmp_path)
    monkeypatch.setenv("CONVNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_files, "LARGE", 24 * 20 - 1)
    for _ in range(2):  # the second time nothing is checked
        check_images(files, threads=2, quiet=True)
    line = f"warning: 8 images have more than 479 pixels, which takes seconds to decode, as {os.fsdecode(files[0])}"
    assert capsys.readouterr().err.splitlines() == [line]


def chunk(kind: bytes, data: bytes, checksum: bytes = b"") -> bytes:
    return len(data).to_bytes(4) + kind + data + (checksum or zlib.crc32(kind + data).to_bytes(4))


MEGABYTES = zlib.compress(bytes(3_000_000))
CHUNKS = {
    "large zTXt": chunk(b"zTXt", b"key\0\0" + MEGABYTES),
    "large iTXt": chunk(b"iTXt", b"key\0\1\0\0\0" + MEGABYTES),
    "checksum": chunk(b"tEXt", b"key\0text", b"fail"),
    "method": chunk(b"zTXt", b"key\0\7text"),
    "profile": chunk(b"iCCP", b"key\0\0" + MEGABYTES),
    "length": chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks_of_a_png_that_are_no_pixels_are_no_damage(kind, place, tmp_path):
    path = save_tagged(tmp_path / "a.png", STORED[6](UPRIGHT), 6)
    raw = Path(path).read_bytes()
    start = raw.index(b"IDAT" if place == "before" else b"IEND") - 4
    Path(path).write_bytes(raw[:start] + CHUNKS[kind] + raw[start:])
    check_image(path)
    assert np.array_equal(np.asarray(decode_image(path)), UPRIGHT)
    Path(path).write_bytes(raw[:33] + CHUNKS[kind] + raw[33 : raw.index(b"IDAT") + 10])
    with pytest.raises(DataError, match=r"a\.png"):
        check_image(path)


@pytest.mark.parametrize(("mode", "how"), SOUND)
def test_a_jpeg_that_ends_gray_by_nature_is_read(mode, how, tmp_path):
    grey = Image.new("RGB", (90, 70), (128, 128, 128))
    grey.paste(Image.open(io.BytesIO(photo(size=(90, 30)))), (0, 0))
    path = tmp_path / "grey.jpg"
    grey.convert(mode).save(path, quality=80, **how)
    assert image_files._ends_gray(Image.open(path)) or mode == "CMYK"
    assert np.array_equal(np.asarray(decode_image(str(path))), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("size", [(1, 1), (3, 100), (8, 8), (17, 9)])
def test_small_jpegs_are_read(size, tmp_path):
    path = tmp_path / "small.jpg"
    Image.new("RGB", size, (128, 128, 128)).save(path)
    check_image(str(path))
    assert decode_image(str(path)).size == size


def write_folder(root, classes="ab", train=4, val=2):
    for part, n in (("train", train), ("val", val)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                (root / part / name / f"{i}.jpg").write_bytes(photo(size=(24, 20), seed=i + 100 * (part == "val")))


RUN = "--layer Conv2d --channels 4 --dataset folder --resize 8 --batch_size 4 --num_workers 0 --device cpu".split()


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_image_that_turns_out_damaged_on_the_way_ends_the_run_with_status_1(part, tmp_path, quick_results, capsys):
    write_folder(tmp_path / "data")
    line = [*RUN, "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    assert allconvnet_main.main([*line, "--num_epochs", "1"]) == 0
    path = tmp_path / "data" / part / "b" / "1.jpg"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3] + b"\xff\xd9")
    capsys.readouterr()
    assert allconvnet_main.main([*line, "--num_epochs", "2", "--resume"]) == 1
    *_, error = capsys.readouterr().err.splitlines()  # after warnings of changed files
    assert error.startswith("stopped: ") and str(path) in error
    assert f"--resume continues from {tmp_path / 'run' / 'last.pt'}" in error
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1
    if part == "val":
        assert allconvnet_main.main([*line, "--test_only"]) == 1
        assert str(path) in capsys.readouterr().err
    path.write_bytes(raw)
    assert allconvnet_main.main([*line, "--num_epochs", "2", "--resume"]) == 0


# --- once ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """The files that have been looked at; what is remembered is of this test alone."""
    seen = []
    real = image_files.check_image
    monkeypatch.setenv("CONVNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_files, "check_image", lambda path, *how: (seen.append(path), real(path, *how))[1])
    monkeypatch.setattr(image_files, "CHUNK", 3)
    return seen


def files_in(root, count=8):
    paths = [root / "train" / name / f"{i}.jpg" for name in "ab" for i in range(count // 2)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(size=(24, 20), seed=i))
    return paths, np.array([os.fsencode(path) for path in paths])


def test_images_are_checked_once(tmp_path, checks):
    paths, files = files_in(tmp_path)
    check_images(files, threads=2, quiet=True)
    assert sorted(checks) == sorted(map(str, paths))
    checks.clear()
    check_images(files, threads=1, quiet=True)
    assert checks == []
    os.utime(paths[3], ns=(1, 1))  # alone in its chunk of at most three of a folder
    check_images(files, threads=1, quiet=True)
    assert checks == [str(paths[3])]
    checks.clear()
    paths[5].write_bytes(photo(size=(24, 20), seed=50))
    check_images(files, threads=1, quiet=True)
    assert checks == [str(path) for path in paths[4:7]]


def test_what_some_processes_have_checked_another_number_of_them_knows(tmp_path, checks):
    paths, files = files_in(tmp_path)
    for rank in range(3):
        check_images(files, threads=1, quiet=True, rank=rank, world=3)
    assert sorted(checks) == sorted(map(str, paths))
    checks.clear()
    for rank in range(2):
        check_images(files, threads=1, quiet=True, rank=rank, world=2)
    assert checks == []


def test_a_broken_image_is_found_again_and_the_others_are_remembered(tmp_path, checks):
    paths, files = files_in(tmp_path)
    paths[4].write_bytes(b"no image")
    for _ in range(2):
        checks.clear()
        with pytest.raises(DataError, match=str(paths[4])):
            check_images(files, threads=1, quiet=True)
    assert str(paths[4]) in checks and not set(checks) & set(map(str, paths[:4]))


@pytest.mark.parametrize("text", ["", "{", "3", "[1, 2]", '"x"', '{"a": 1}', "\ud800"])
def test_a_damaged_memory_of_checks_is_no_memory(text, tmp_path, checks):
    paths, files = files_in(tmp_path)
    check_images(files, threads=1, quiet=True)
    (memory,) = (tmp_path / "cache").iterdir()
    assert len(memory.read_text().split()) == 4
    memory.write_bytes(text.encode(errors="surrogatepass"))
    checks.clear()
    check_images(files, threads=1, quiet=True)
    assert len(checks) == len(paths)


def test_where_nothing_can_be_remembered_images_are_checked_every_time(tmp_path, checks, monkeypatch, capsys):
    paths, files = files_in(tmp_path)

    def read_only(*_, **_more):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        check_images(files, threads=1, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(run_files, "open", read_only, raising=False)
        check_images(files, threads=1, quiet=True)
    assert len(checks) == 2 * len(paths) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"CONVNN_CACHE": "/one", "XDG_CACHE_HOME": "/two", "HOME": "/three"}, "/one"),
        ({"XDG_CACHE_HOME": "/two", "HOME": "/three"}, "/two/convnn"),
        ({"CONVNN_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/three"}, "/three/.cache/convnn"),
    ],
)
def test_where_checks_are_remembered(variables, folder, monkeypatch):
    for name in ("CONVNN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)
