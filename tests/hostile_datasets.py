"""What a dataset can do to a user: the pictures, their places, the card, what lies beside them."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from hostile import CARD, Happens, Refused, Row, Safe, World, both, card, code, nested, payload, text
from PIL import Image
from pyarrow.parquet import write_table

REDS = {"a": 0, "b": 40}  # class -> the red of its picture


def pictures(folder: Path) -> None:
    """Two clean images."""
    for name, red in REDS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(png(red))


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10**5))
        + chunk(b"IEND", b"")
    )


def png(red: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(stream, "png")
    return stream.getvalue()


def parquet(first: dict[str, Any]) -> bytes:
    """Two rows, of which the first has this picture."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    picture = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    images = pyarrow.array([first, {"bytes": png(40), "path": None}], type=picture)
    table = pyarrow.table({"image": images, "label": [0, 1]})
    stream = io.BytesIO()
    write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), stream)
    return stream.getvalue()


def picture(content: bytes) -> Callable[[World], None]:
    return lambda world: world.write("a/0.png", content)


def rows(first: Callable[[World], str]) -> Callable[[World], None]:
    """Rows instead of files, the first picture by its place."""

    def make(world: World) -> None:
        empty(world)
        world.write("data/train.parquet", parquet({"bytes": None, "path": first(world)}))

    return make


def empty(world: World) -> None:
    shutil.rmtree(world.folder)
    world.folder.mkdir()


def picture_of_the_user(world: World) -> str:
    file = world.folder.parent / "private.png"
    file.write_bytes(png(200))
    return str(file)


def script(world: World) -> None:
    empty(world)
    for name in (world.folder.name, world.repo.rsplit("/")[-1]):
        world.write(f"{name}.py", code(world.marker))


def archive(world: World) -> None:
    empty(world)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in {"../../evil0.png": png(0), "../../evil1.png": png(40)}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    world.write("data.tar", stream.getvalue())


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
CLOSED = ("127.0.0.1", 9)  # nobody is there
ADDRESS = f"http://{CLOSED[0]}:{CLOSED[1]}/x.parquet"
ELSEWHERE = f"configs:\n- config_name: default\n  data_files: {ADDRESS}"
FIRST, UNDECODED, UNLOADED = "The picture at index 0", "cannot be decoded", "cannot be loaded"
BOMB = "could be decompression bomb"
DATASETS = [
    both("picture of 10^10 pixels", picture(bomb(10**5)), Refused(BOMB)),
    both("picture of 10^8 pixels", picture(bomb(10**4)), Refused(BOMB)),
    both("picture that is a pickle", lambda w: w.write("a/0.png", payload(w.marker)), Refused(UNDECODED)),
    both("picture that ends too early", picture(png(0)[:-30]), Refused(UNDECODED)),
    both("picture that is a program for Ghostscript (EPS)", picture(EPS), Refused(UNDECODED)),
    both("picture that is an address", rows(lambda w: f"http://{CLOSED[0]}:{CLOSED[1]}/0.png"), Refused(FIRST)),
    Row("picture that is a file of the user", rows(picture_of_the_user), Refused(FIRST), None),
    both("script that loads the dataset", script, Refused(UNLOADED)),
    both(
        "script beside the pictures", lambda w: w.write("load.py", code(w.marker)), Safe("only the pictures are read")
    ),
    both(
        "archive with files called ../../evil.png",
        archive,
        Safe("the pictures are read; nothing is written outside the cache"),
    ),
    both(
        "card whose YAML calls a function",
        lambda w: w.write(CARD, card(f"license: !!python/object/apply:builtins.open ['{w.marker}', 'w']")),
        Refused(UNLOADED),
    ),
    both("card whose YAML is 1,000 levels deep", text(card(f"license: {nested(1000)}")), Refused(UNLOADED)),
    both(
        "card that names data at an address",
        text(card(ELSEWHERE)),
        Happens("refused, but `datasets` asks the server at that address first", UNLOADED, CLOSED),
    ),
]
