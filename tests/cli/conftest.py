"""The command line in this process: `main()` with its arguments, its streams and its exit status."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from firebuild_bootstrap.cli import main
from firebuild_bootstrap.home import Home
from support import leftovers


@dataclass(frozen=True)
class Done:
    out: str
    err: str

    @property
    def first(self) -> str:
        return self.err.split("\n", 1)[0]


@dataclass(frozen=True)
class Cli:
    """Runs `firebuild …` in this process."""

    home: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path, status: int = 0) -> Done:
        self.monkeypatch.setattr(sys, "argv", ["firebuild", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        done = Done(*self.capfd.readouterr())
        assert (ended.value.code or 0) == status, done
        assert "Traceback" not in done.err
        return done

    def setenv(self, name: str, value: str | Path) -> None:
        self.monkeypatch.setenv(name, str(value))

    def leftovers(self) -> list[str]:
        return leftovers(self.home)


@pytest.fixture(scope="session")
def host_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that already holds the base `host`."""
    root = tmp_path_factory.mktemp("home")
    Home(root).bases.create_from_host("host")
    return root


@pytest.fixture
def make_cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """A command line with an empty store, in an empty directory, without the user's own settings."""
    for name in [name for name in os.environ if name.startswith("FIREBUILD_")]:
        monkeypatch.delenv(name)
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    monkeypatch.setenv("FIREBUILD_HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Cli(tmp_path / "home", monkeypatch, capfd)


@pytest.fixture
def cli(make_cli: Cli) -> Cli:
    return make_cli


@pytest.fixture
def host_cli(make_cli: Cli, host_home: Path) -> Cli:
    """The same with a store that holds the base `host`."""
    make_cli.setenv("FIREBUILD_HOME", host_home)
    return Cli(host_home, make_cli.monkeypatch, make_cli.capfd)
