"""The settings of a build: one section per subject, all optional.

Precedence, lowest first: defaults, the file, `FIREBUILD_<SECTION>__<KEY>` in the environment, options
of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from firebuild_bootstrap.bootstrap_settings import BootstrapSettings, ByteSize
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.names import RESERVED_ENVIRONMENT
from firebuild_bootstrap.image.remotecache import parse_cache
from firebuild_bootstrap.machine.settings import MachineSettings
from firebuild_bootstrap.registry.settings import RegistriesSettings
from firebuild_pki.config import CASettings, Document, Settings, load_document, validate


class StoreSettings(Settings):
    """The section `store`: where bases and images are kept."""

    path: str | None = None
    """Directory; by default $FIREBUILD_HOME, or firebuild in the user's data directory."""


def _check_cache(text: str, *, export: bool) -> str:
    try:
        parse_cache(text, export=export)
    except InputError as error:
        raise PydanticCustomError("cache", "{text}", {"text": error.message, "hint": error.hint}) from error
    return text


class CacheSettings(Settings):
    """The section `cache`: results of steps that later builds use."""

    max_size: ByteSize | None = None
    """What they may take on the disk, after each build; the least recently used goes first. Without it,
    20GiB, or a quarter of the disk if that is less."""

    import_from: tuple[Annotated[str, AfterValidator(partial(_check_cache, export=False))], ...] = ()
    """Caches of other machines that builds use, as --cache-from names them, instead of these."""
    export_to: tuple[Annotated[str, AfterValidator(partial(_check_cache, export=True))], ...] = ()
    """Where builds write their cache for other machines, as --cache-to names it, instead of these."""


class BuildSettings(Settings):
    """The whole configuration file."""

    ca: CASettings = Field(default_factory=lambda: CASettings.model_validate({}))
    bootstrap: BootstrapSettings = BootstrapSettings()
    machine: MachineSettings = MachineSettings()
    store: StoreSettings = StoreSettings()
    cache: CacheSettings = CacheSettings()
    registries: RegistriesSettings = RegistriesSettings()

    @property
    def ca_provider(self) -> str:
        """The name of the CA provider."""
        return self.ca.provider


def load_settings(
    file: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any] | None = None
) -> BuildSettings:
    """Read the settings from a file, the environment and options.

    Args:
        file: the configuration file, or None for defaults.
        environ: environment variables, usually `os.environ`.
        overrides: dotted path to value, from options of the command line.

    Raises:
        firebuild_pki.SettingsError: every problem found, with file, line and column.
    """
    document = Document({}) if file is None else load_document(file)
    document = document.merged(environ, reserved=RESERVED_ENVIRONMENT)
    return validate(BuildSettings, document.overridden(overrides or {}))
