"""Writing a file so that a half-written one never replaces a whole one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qk.errors import fail

TEMPORARY = ".qk-"  # how the name of a file starts that is not in place yet


def replace_file(path: str | Path, content: bytes) -> Path:
    """Puts content at `path`: all of it or, if this dies, nothing. Folders are made. Returns the path.

    Raises OSError for a place that cannot be written.
    """
    with replacing(path) as file:
        file.write(content)
    return Path(path)


def write_json(path: str | Path, data: Any, stage: str) -> Path:
    """Puts data at `path` as JSON, as replace_file does. Raises QkError for a place that cannot be written."""
    try:
        return replace_file(path, json.dumps(data, indent=1).encode())
    except OSError as error:
        raise fail(stage, str(path), "a place that can be written", error.strerror or error) from error


def check_writable(path: str | Path, stage: str) -> Path:
    """The path of a file that will be written, whose folder is made. Raises QkError now for a place that cannot be
    written, so that no work is lost later."""
    path = Path(path)
    writable_folder(path.parent, stage)
    if path.is_dir():
        raise fail(stage, str(path), "a file", "a folder")
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which is put at `path` when the block ends and removed when it raises. Folders are made.

    Raises OSError for a place that cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # so that the rename outlives a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def writable_folder(folder: str | Path, stage: str) -> Path:
    """The folder, made where it is missing. Raises QkError when nothing can be written there."""
    if not isinstance(folder, str | os.PathLike):
        raise fail(stage, "folder", "a path", f"{folder!r}, {type(folder).__name__}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=TEMPORARY, dir=folder):
            pass
    except OSError as error:
        raise fail(stage, str(folder), "a folder that can be written", error.strerror or error) from error
    return folder
