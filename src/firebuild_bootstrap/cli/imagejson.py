"""An image as the JSON that `images inspect` prints and `--metadata-file` writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.terminal import json_text

if TYPE_CHECKING:
    from firebuild_bootstrap.image.store import StoredImage


def image_document(image: StoredImage, identity: str = "") -> dict[str, Any]:
    """Return the image's record, with the absolute paths of its outputs and its id, if that is known."""
    document = {**({"id": identity} if identity else {}), **image.record.as_json()}
    for output in document["outputs"]:
        output["path"] = str(image.location / output["path"])
    return document


def as_text(document: Any) -> str:
    """Return a document as the command prints it."""
    return json_text(document, indent=2) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there completely or as it was before.

    Raises:
        InputError: it can't be written.
    """
    try:
        # Its name is short, or a long one of the file would be too long with anything added to it.
        descriptor, partial = tempfile.mkstemp(prefix=".firebuild-", dir=path.parent)
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
