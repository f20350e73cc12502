"""The command line in this process: `main()` with its arguments, its streams and its exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from firebuild_bootstrap.cli import main
from firebuild_bootstrap.cli.failure import SIGNALS
from firebuild_bootstrap.home import Home
from support import leftovers, unwarned


@dataclass(frozen=True)
class Done:
    out: str
    err: str

    @property
    def first(self) -> str:
        """The first line of the errors, without the warning to a user who has no subordinate ids."""
        return unwarned(self.err).split("\n", 1)[0]


@dataclass(frozen=True)
class Cli:
    """Runs `firebuild …` in this process."""

    home: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str | Path, status: int = 0) -> Done:
        ended, done = self._run(*arguments)
        assert ended == status, done
        return done

    def status_of(self, *arguments: str | Path) -> int:
        """Return the exit status where it is not known beforehand."""
        return self._run(*arguments)[0]

    def _run(self, *arguments: str | Path) -> tuple[int, Done]:
        self.monkeypatch.setattr(sys, "argv", ["firebuild", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        done = Done(*self.capfd.readouterr())
        assert "Traceback" not in done.err
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, done

    def setenv(self, name: str, value: str | Path) -> None:
        self.monkeypatch.setenv(name, str(value))

    def leftovers(self) -> list[str]:
        return leftovers(self.home)


def nothing_is_left(cli: Cli) -> bool:
    staging = cli.home / "images/staging"
    return cli.leftovers() == [] and not (staging.exists() and os.listdir(staging))


@pytest.fixture
def stdin(tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    """Let standard input of this process hold something."""
    saved = os.dup(0)

    def hold(content: bytes) -> None:
        (tmp_path / "stdin").write_bytes(content)
        descriptor = os.open(tmp_path / "stdin", os.O_RDONLY)
        os.dup2(descriptor, 0)
        os.close(descriptor)

    yield hold
    os.dup2(saved, 0)
    os.close(saved)


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
    monkeypatch.setenv("FIREBUILD_PULL", "never")
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
