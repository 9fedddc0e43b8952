"""Takes a delta's file apart, and damages it in one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Header = dict[str, Any]


def take_apart(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(path: Path, header: Header | str | bytes, data: bytes) -> None:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def replace_bytes(path: Path, key: str, change: Callable[[bytearray], None]) -> None:
    header, data = take_apart(path)
    start, end = header[key]["data_offsets"]
    part = bytearray(data[start:end])
    change(part)
    put_together(path, header, data[:start] + bytes(part) + data[end:])


def int32(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


def set_index(position: int, value: int) -> Callable[[Path], None]:
    def change(part: bytearray) -> None:
        position_in_bytes = 4 * (position % (len(part) // 4))
        part[position_in_bytes : position_in_bytes + 4] = int32(value)

    return lambda path: replace_bytes(path, "indices/conv.weight", change)


def repeat_first_index(path: Path) -> None:
    def change(part: bytearray) -> None:
        part[4:8] = part[:4]

    replace_bytes(path, "indices/conv.weight", change)


def swap_indices(path: Path) -> None:
    def change(part: bytearray) -> None:
        part[:8] = part[4:8] + part[:4]

    replace_bytes(path, "indices/conv.weight", change)


def move_index(path: Path) -> None:
    def change(part: bytearray) -> None:
        indices = torch.frombuffer(part, dtype=torch.int32)
        gap = int((indices.diff() > 1).nonzero()[0])
        indices[gap] += 1

    replace_bytes(path, "indices/conv.weight", change)


def set_value(key: str, value: float) -> Callable[[Path], None]:
    raw = torch.tensor([value]).numpy().tobytes()

    def change(part: bytearray) -> None:
        part[:4] = raw

    return lambda path: replace_bytes(path, key, change)


def edit_metadata(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        for name, value in changes.items():
            if value is None:
                del header["__metadata__"][name]
            else:
                header["__metadata__"][name] = value
        put_together(path, header, data)

    return edit


def edit_shapes(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        shapes = json.loads(header["__metadata__"]["shapes"])
        shapes.update({"conv.weight": changes["conv"]})
        header["__metadata__"]["shapes"] = json.dumps(shapes)
        put_together(path, header, data)

    return edit


def edit_entry(key: str, **changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        header[key].update(changes)
        put_together(path, header, data)

    return edit


def rename(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        put_together(path, {new if k == old else k: v for k, v in header.items()}, data)

    return edit


def add_tensor(key: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        header, data = take_apart(path)
        end = len(data)
        header[key] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
        put_together(path, header, data + b"\0\0\0\0")

    return edit


def split_last_value(path: Path) -> None:
    """Give one value of a parameter to another tensor, so that lengths disagree."""
    header, data = take_apart(path)
    entry = header["values/conv.weight"]
    start, end = entry["data_offsets"]
    entry["data_offsets"], entry["shape"] = [start, end - 4], [(end - start) // 4 - 1]
    header["buffer/stray"] = {"dtype": "F32", "shape": [1], "data_offsets": [end - 4, end]}
    put_together(path, header, data)


def name_twice(path: Path) -> None:
    header, data = take_apart(path)
    entry = json.dumps(header["values/conv.bias"])
    put_together(path, json.dumps(header)[:-1] + f', "values/conv.bias": {entry}}}', data)


def name_metadata_twice(path: Path) -> None:
    header, data = take_apart(path)
    text = json.dumps(header).replace(
        '"format_version"', '"format_version": "1", "format_version"', 1
    )
    put_together(path, text, data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"extra")


def content(raw: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(raw)


def signed(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a change that leaves a file whose checksum is right."""

    def change_and_sign(path: Path) -> None:
        change(path)
        header, data = take_apart(path)
        digest = hashlib.sha256()
        for name, entry in sorted((n, e) for n, e in header.items() if n != "__metadata__"):
            dtype = str(load_file(path)[name].dtype)
            digest.update(json.dumps([name, dtype, entry["shape"]]).encode())
            digest.update(data[slice(*entry["data_offsets"])])
        header["__metadata__"]["sha256"] = digest.hexdigest()
        put_together(path, header, data)

    return change_and_sign
