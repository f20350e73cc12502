from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from baoserver import DevServer, JwtIssuer
from pki_ci.page import Job, blocks
from support import BIN

ISSUERS = {"github": "https://token.actions.githubusercontent.com", "gitlab": "https://gitlab.com"}


@dataclass(frozen=True)
class Ran:
    """How a script ended.

    Args:
        status: its exit status.
        output: what it wrote, standard error included.
    """

    status: int
    output: str

    @property
    def said(self) -> str:
        """The output in one line: how wide it was broken does not matter."""
        return " ".join(self.output.split())


@dataclass(frozen=True)
class Checkout:
    """A checkout of the repository that the page describes, on a machine with firebuild.

    Args:
        directory: the working directory of the commands.
        home: HOME, and where the store is.
    """

    directory: Path
    home: Path

    def run(self, shell: tuple[str, ...], script: str, environ: Mapping[str, str]) -> Ran:
        """Run a script as a CI system does, from a file."""
        file = self.directory.parent / "step.sh"
        file.write_text(script)
        done = subprocess.run(
            [*shell, str(file)],
            cwd=self.directory,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return Ran(done.returncode, done.stdout)

    def step(self, job: Job, title: str, environ: Mapping[str, str]) -> Ran:
        """Run one step of a job."""
        return self.run(job.shell, job.steps[title], {**job.environ, **environ})

    @property
    def environ(self) -> dict[str, str]:
        """What every command sees; nothing of the environment of the tests but PATH."""
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
        return {"PATH": path, "HOME": str(self.home), "FIREBUILD_HOME": str(self.home / "store")}


@pytest.fixture(scope="session")
def issuers() -> dict[str, JwtIssuer]:
    """The signers of both CI systems."""
    return {name: JwtIssuer(address) for name, address in ISSUERS.items()}


@pytest.fixture(scope="session")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    """The server that the page's commands set up."""
    with DevServer(tmp_path_factory.mktemp("vault")) as server:
        yield server


def fill(directory: Path, vault: DevServer) -> None:
    """Write the files of the page; only the address of Vault differs."""
    files = blocks()
    configuration = files["firebuild.yaml"].replace("https://vault.example:8200", vault.address)
    assert vault.address in configuration
    (directory / "firebuild.yaml").write_text(configuration)
    (directory / "Dockerfile").write_text(files["Dockerfile"])
    (directory / "motd").write_text("hello\n")


@pytest.fixture
def checkout(tmp_path: Path, vault: DevServer) -> Checkout:
    made = Checkout(tmp_path / "checkout", tmp_path / "home")
    for directory in (made.directory, made.home):
        directory.mkdir()
    fill(made.directory, vault)
    return made


Operator = Callable[[str], None]


@pytest.fixture(scope="session")
def operator(
    tmp_path_factory: pytest.TempPathFactory, vault: DevServer, issuers: dict[str, JwtIssuer]
) -> Operator:
    """Runs the commands of the page for one CI system, with public keys instead of the issuer's address."""
    place = Checkout(tmp_path_factory.mktemp("operator"), tmp_path_factory.mktemp("home"))
    fill(place.directory, vault)

    @cache
    def output(name: str) -> tuple[int, str]:
        (place.directory / "keys.pem").write_text(issuers[name].public_key_pem)
        discovery = f"oidc_discovery_url={ISSUERS[name]}"
        script = blocks()[name]
        assert discovery in script
        script = script.replace(discovery, "jwt_validation_pubkeys=@keys.pem")
        environ = {"VAULT_ADDR": vault.address, "BAO_ADDR": vault.address, "BAO_TOKEN": vault.root_token}
        ran = place.run(("sh", "-eu"), script, environ)
        return ran.status, ran.output

    def run(name: str) -> None:
        status, text = output(name)
        assert status == 0, text

    return run
