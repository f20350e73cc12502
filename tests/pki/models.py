"""A made-up configuration that uses every kind of setting."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

import pytest
from pydantic import Field

from firebuild_pki import (
    CASettings,
    Duration,
    SecretRef,
    Settings,
    SettingsError,
    parse_document,
    validate,
)


class Token(Settings):
    method: Literal["token"]
    token: SecretRef


class AppRole(Settings):
    method: Literal["approle"]
    role_id: SecretRef
    mounts: tuple[str, ...] = ()


class Server(Settings):
    address: str
    port: int = 443
    verify: bool = True
    timeout: Duration = timedelta(seconds=10)
    ratio: float = 1.0
    auth: Annotated[Token | AppRole, Field(discriminator="method")] | None = None
    replicas: tuple[Server, ...] = ()
    limits: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)


class Everything(Settings):
    server: Server = Server(address="localhost")
    ca: CASettings = Field(default_factory=CASettings)


def problems(text: str, model: type[Settings] = Everything, at: str = "", **context: object) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        validate(model, parse_document(text, source="fb.yaml"), at, context=context)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return str(caught.value).splitlines()
