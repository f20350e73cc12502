"""The project of a new plugin: a provider that works, to be turned into another one.

The files of the project are in ``template``. Their names lose the suffix ``.template``, the word
``package`` in a path becomes the package of the plugin, and what is written as ``$name`` in them is
filled in (`string.Template`).
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePath
from string import Template

from firebuild_pki.errors import CAError
from firebuild_pki.plugins import PluginCatalog
from firebuild_pki.provider import API_VERSION, RESERVED_NAMES
from firebuild_pki.values import dataclass

PREFIX = "firebuild-pki-"
"""What the names of distributions begin with."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SUFFIX = ".template"


@dataclass(frozen=True, slots=True)
class _Names:
    """What is filled in."""

    name: str
    distribution: str
    package: str
    prefix: str
    api_version: int

    @classmethod
    def of(cls, name: str) -> _Names:
        words = name.split("-")
        package = "_".join([*PREFIX.split("-")[:-1], *words])
        return cls(name, PREFIX + name, package, "".join(map(str.capitalize, words)), API_VERSION)


def new_plugin(name: str, directory: Path) -> Path:
    """Write the project of a new provider: package, entry point, tests, README.

    Args:
        name: what people will write in their configuration; ``firebuild-pki-`` before it is left out.
        directory: where the project is put; made if it is missing.

    Returns:
        The project, ``<directory>/firebuild-pki-<name>``.

    Raises:
        CAError: the name cannot be used, there is such a project, or it cannot be written. Then
            nothing was written.
    """
    name = name.removeprefix(PREFIX)
    _check_name(name)
    names = _Names.of(name)
    project = directory / names.distribution
    try:
        _check_place(project)
        directory.mkdir(parents=True, exist_ok=True)
        _write_beside(project, names)
    except OSError as error:
        raise CAError(f"cannot write {project}: {error.strerror}") from error
    return project


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        words = re.findall(r"[a-z0-9]+", name.lower())
        likely = "-".join(words).lstrip("0123456789-") or "my-ca"
        raise CAError(
            f'expected a name of lower-case letters, digits and single dashes, found "{name}"',
            hint=f'it begins with a letter, for example "{likely}"',
        )
    if name in RESERVED_NAMES | {one.replace("_", "-") for one in RESERVED_NAMES}:
        raise CAError(f'"{name}" is a setting of the section ca, and cannot be the name of a provider')
    catalog = PluginCatalog()
    for plugin in (*catalog.providers(), *catalog.observers(), *catalog.key_stores()):
        if plugin.name == name:
            raise CAError(f'"{name}" is the name of a plugin of {plugin}', hint="choose another name")


def _check_place(project: Path) -> None:
    if project.is_symlink() or (project.exists() and not project.is_dir()):
        raise CAError(f"{project} is there already, and is not a directory", hint="choose another directory")
    if project.is_dir() and any(project.iterdir()):
        raise CAError(f"the directory {project} is there already, and not empty", hint="move it away")


def _write_beside(project: Path, names: _Names) -> None:
    draft = project.with_name(f".{project.name}.{secrets.token_hex(4)}")
    try:
        for path, template in _templates(files(__name__) / "template", PurePath()):
            target = draft / _placed(path, names)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = Template(template.read_text(encoding="utf-8")).substitute(asdict(names))
            target.write_text(text, encoding="utf-8")
        draft.rename(project)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _templates(folder: Traversable, below: PurePath) -> Iterator[tuple[PurePath, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _templates(entry, below / entry.name)
        else:
            yield below / entry.name, entry


def _placed(path: PurePath, names: _Names) -> PurePath:
    parts = [part.replace("package", names.package) for part in path.parts]
    name = parts[-1].removesuffix(_SUFFIX)
    return PurePath(*parts[:-1], ".gitignore" if name == "gitignore" else name)
