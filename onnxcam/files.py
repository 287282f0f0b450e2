"""Files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from onnxcam.errors import OnnxcamError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file to write, which replaces `path` at the end; it has a temporary name beside it until then.

    Raises:
        OnnxcamError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.parent / f".{os.urandom(8).hex()}.tmp"
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise OnnxcamError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # gone already, unless something went wrong
            temporary.unlink()
