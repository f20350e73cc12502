"""How images and bases are called."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from firebuild_bootstrap.errors import InputError

_PART: Final = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_VERSION: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_TAG: Final = re.compile(rf"({_PART})/({_PART}):({_VERSION})")
_REFERENCE: Final = re.compile(rf"({_PART}(?:/{_PART})*)(?::({_VERSION}))?(?:@(sha256:[0-9a-f]{{64}}))?")
_MAX_NAME: Final = 200  # of a file name 255 bytes are allowed


@dataclass(frozen=True, order=True)
class ImageTag:
    """The name of a built image: `org/name:version`, lower case but for the version."""

    org: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.org}/{self.name}:{self.version}"

    @classmethod
    def parse(cls, text: str) -> ImageTag:
        """Read a tag.

        Raises:
            InputError: `text` has another form.
        """
        found = _TAG.fullmatch(text)
        if found is None or len(text) > _MAX_NAME:
            raise InputError(
                f"expected a tag of the form org/name:version, found {text!r}",
                hint="lower-case letters, digits and single . _ - inside, for example acme/web:1.0",
            )
        return cls(*found.groups())


@dataclass(frozen=True, order=True)
class Reference:
    """What FROM names: `name`, `tag` (`latest` when left out) and the digest it must have, if any."""

    name: str
    tag: str = "latest"
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}" + (f"@{self.digest}" if self.digest else "")

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference.

        Raises:
            InputError: `text` has another form.
        """
        found = _REFERENCE.fullmatch(text)
        if found is None or len(text) > _MAX_NAME + 80:
            raise InputError(
                f"expected a base such as debian or debian:12, found {text!r}",
                hint="names are lower case: letters, digits and single . _ - inside, parts divided by /",
            )
        return cls(found[1], found[2] or "latest", found[3] or "")


def default_home(environ: Mapping[str, str]) -> Path:
    """Return where images, bases and builds are kept: FIREBUILD_HOME, or else the user's data directory."""
    chosen = environ.get("FIREBUILD_HOME")
    return Path(os.path.abspath(chosen)) if chosen else Path(platformdirs.user_data_dir("firebuild"))
