"""An image as the JSON that `images inspect` prints and `--metadata-file` writes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firebuild_bootstrap.errors import InputError

if TYPE_CHECKING:
    from firebuild_bootstrap.image.store import StoredImage


def image_json(image: StoredImage) -> str:
    """Return the image's record, with the absolute paths of its outputs."""
    document: dict[str, Any] = image.record.as_json()
    for output in document["outputs"]:
        output["path"] = str(image.location / output["path"])
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def check_writable(path: Path) -> None:
    """Refuse, before anything is built, a file that could not be written at the end.

    Raises:
        InputError: its directory does not exist or can't be written.
    """
    if not os.path.isdir(path.parent):
        raise InputError(f"{path} can't be written: {path.parent} is no directory", hint="make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} can't be written: no right to write in {path.parent}")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there completely or as it was before.

    Raises:
        InputError: it can't be written.
    """
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror}") from error
