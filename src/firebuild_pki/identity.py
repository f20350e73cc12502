"""The names of a build's two ends."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from firebuild_pki.errors import IdentityError
from firebuild_pki.provider import Profile

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

MAX_NAME = 253
"""Upper bound of a DNS name in text form, RFC 1035 section 3.1."""


@dataclass(frozen=True, slots=True)
class Identity:
    """DNS names of the server and the guest of one build.

    Args:
        build_id: one DNS label (RFC 1123): lower-case letters, digits and inner dashes, at most 63.
        suffix: domain that the names are below.

    Raises:
        IdentityError: they do not make DNS names.
    """

    build_id: str
    suffix: str

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.build_id):
            raise IdentityError(
                f'expected a build id that is a DNS label, found "{self.build_id}"',
                hint="use 1 to 63 lower-case letters, digits and dashes, no dash at the ends",
            )
        if not all(_LABEL.fullmatch(label) for label in self.suffix.split(".")):
            raise IdentityError(
                f'expected a lower-case domain as name suffix, found "{self.suffix}"',
                hint="for example firebuild.internal",
            )
        if len(self.guest) > MAX_NAME:
            raise IdentityError(f"the name {self.guest} is longer than {MAX_NAME} characters")

    @property
    def server(self) -> str:
        """Name of the server, which the guest checks."""
        return f"{self.build_id}.{self.suffix}"

    @property
    def guest(self) -> str:
        """Name of the guest."""
        return f"guest.{self.server}"

    def of(self, profile: Profile) -> str:
        """Name of one end."""
        return self.server if profile is Profile.SERVER else self.guest


def random_build_id() -> str:
    """Make up an id that no other build has."""
    return secrets.token_hex(8)
