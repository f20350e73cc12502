"""The block `machine.external` (docs/external.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from ipaddress import ip_address
from typing import Annotated, Final, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from firebuild_pki.config import PositiveDuration, Settings

STDOUT: Final = "stdout"
_HOST_PORT: Final = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/\[\]]+))(?::(?P<port>[0-9]{1,5}))?"
)

FilePath = Annotated[str, StringConstraints(min_length=1)]


class MetadataTarget(Settings):
    """Where the metadata go: ``stdout``, ``{file: PATH}`` or ``{firecracker_socket: PATH}``."""

    file: FilePath | None = None
    """A file that gets the document, for the program that serves it to the guest."""
    firecracker_socket: FilePath | None = None
    """The API socket of the Firecracker that runs the machine, or is about to."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["file"]}, {"required": ["firecracker_socket"]}]}
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_them(cls, value: object) -> object:
        if value == STDOUT:
            return {}
        if isinstance(value, Mapping) and value and len({"file", "firecracker_socket"} & set(value)) < 2:
            return value
        raise PydanticCustomError(
            "metadata_target",
            "{text}",
            {"text": "expected stdout, {file: PATH} or {firecracker_socket: PATH}", "hint": ""},
        )

    @model_serializer
    def _as_written(self) -> str | dict[str, str]:
        return dict(self.__repr_args__()) or STDOUT

    def __repr_args__(self) -> Iterator[tuple[str, str]]:
        yield from ((name, path) for name, path in self if path is not None)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        body = handler.resolve_ref_schema(schema)
        mapping = dict(body)
        body.clear()
        body["anyOf"] = [{"const": STDOUT}, mapping]
        return schema


def split_host_port(text: str) -> tuple[str, int | None]:
    """Read `host`, `host:port`, `[::1]:port` or a bare IPv6 address.

    Raises:
        ValueError: it is none of them; the message says so.
    """
    if text.count(":") > 1 and not text.startswith("["):
        return str(ip_address(text)), None
    found = _HOST_PORT.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or not 0 <= (port or 0) <= 65535:
        raise ValueError(f'expected host:port such as 192.0.2.1:7000, found "{text}"')
    return (str(ip_address(found["v6"])) if found["v6"] else found["host"]), port


def _bind(value: str) -> str:
    host, _ = split_host_port(value)
    try:
        ip_address(host)
    except ValueError:
        raise ValueError(f'expected an IP address of this host, found "{host}"') from None
    return value


def _advertise(value: str) -> str:
    _, port = split_host_port(value)
    if port == 0:
        raise ValueError(f'expected a port that the guest can call, found "{value}"')
    return value


class ExternalSettings(Settings):
    """The block `external` of the section `machine`."""

    metadata: MetadataTarget = MetadataTarget.model_validate(STDOUT)
    """Where the metadata go: stdout, {file: PATH} or {firecracker_socket: PATH}."""
    bind: Annotated[str, AfterValidator(_bind)] = "127.0.0.1"
    """Address of this host that the guest calls, with a port if it has to be a certain one."""
    advertise: Annotated[str, AfterValidator(_advertise)] | None = None
    """What the guest dials, host or host:port, where that is not `bind`: behind NAT, or for 0.0.0.0."""
    disk: FilePath | None = None
    """The machine's drive, a file with ext4 on it; without one the image is what the guest sends."""
    fill_disk: bool = True
    """Make that file from the base, and remove it at the end; false: it is there, filled, and only read."""
    end_timeout: PositiveDuration = timedelta(seconds=60)
    """How long the machine may take to unmount its drive after the guest's last call."""

    @model_validator(mode="after")
    def _can_be_dialled(self) -> Self:
        host, _ = split_host_port(self.bind)
        if self.advertise is None and ip_address(host).is_unspecified:
            raise ValueError(
                f"a guest can't connect to {host}: set advertise to the address that it connects to"
            )
        return self

    @property
    def to_stdout(self) -> bool:
        """Whether standard output carries the metadata, so that nothing else may go there."""
        return self.metadata.file is None and self.metadata.firecracker_socket is None
