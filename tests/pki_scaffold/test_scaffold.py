"""The project of a new plugin: what is written, and that it works as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from firebuild_pki import API_VERSION, CAError
from firebuild_pki.scaffold import new_plugin
from pki import conftest
from pki.conftest import Install

install = conftest.install

NAME = "acme-ca"
PACKAGE = "firebuild_pki_acme_ca"
PYTHON = sys.executable
RUFF, MYPY = (str(Path(PYTHON).parent / program) for program in ("ruff", "mypy"))


def run(*command: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program without the settings of the tests around it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environ["PYTHONPATH"] = str(site or "")
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, check=False)


def checked(*command: str, cwd: Path, site: Path | None = None) -> str:
    done = run(*command, cwd=cwd, site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_plugin(NAME, tmp_path_factory.mktemp("projects"))


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the project was installed."""
    target = tmp_path_factory.mktemp("site")
    offline = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index")
    checked(PYTHON, "-m", "pip", "install", *offline, "--target", str(target), ".", cwd=project)
    return target


def run_tests(project: Path, site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # without xdist, whose workers would crowd those that run this test
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments)
    return run(PYTHON, "-m", "pytest", *options, cwd=project, site=site)


def test_the_project_is_complete(project: Path) -> None:
    assert project.name == "firebuild-pki-acme-ca"
    assert {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()} == {
        ".gitignore",
        "README.md",
        "pyproject.toml",
        f"src/{PACKAGE}/__init__.py",
        f"src/{PACKAGE}/backend.py",
        f"src/{PACKAGE}/provider.py",
        f"src/{PACKAGE}/py.typed",
        f"tests/test_{PACKAGE}.py",
        f"tests/test_{PACKAGE}_conformance.py",
    }
    assert [path.name for path in project.parent.iterdir()] == [project.name]


def test_the_project_announces_the_provider(project: Path) -> None:
    written = tomllib.loads((project / "pyproject.toml").read_text())
    assert written["project"]["entry-points"] == {"firebuild_pki.providers": {NAME: PACKAGE}}
    assert written["project"]["name"] == "firebuild-pki-acme-ca"
    assert written["dependency-groups"]["test"] == ["pytest>=8"]


def test_the_project_is_written_for_this_version_of_the_contract(project: Path) -> None:
    assert f"api_version={API_VERSION}," in (project / f"src/{PACKAGE}/__init__.py").read_text()


def test_nothing_is_left_to_fill_in(project: Path) -> None:
    for path in project.rglob("*"):
        assert not path.is_file() or "$" not in path.read_text(), path


def test_everybody_may_read_the_project(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        project = new_plugin(NAME, tmp_path)
    finally:
        os.umask(before)
    assert project.stat().st_mode & 0o777 == 0o755
    assert (project / "README.md").stat().st_mode & 0o777 == 0o644


def test_the_tests_of_the_project_succeed(project: Path, site: Path) -> None:
    done = run_tests(project, site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 30


def test_a_mistake_makes_them_fail_in_the_words_of_the_contract(
    project: Path, site: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(site, tmp_path / "site")
    backend = broken / PACKAGE / "backend.py"
    text = backend.read_text()
    assert "profile=profile" in text
    backend.write_text(text.replace("profile=profile", "profile=Profile.GUEST"))
    config = ("-o", f"pythonpath={broken}", "-k", "conformance and certificate")
    done = run_tests(project, broken, *config)
    assert done.returncode == 1, done.stdout
    assert "the contract:" in done.stdout
    assert "serverAuth" in done.stdout
    assert "cannot be loaded" not in done.stdout


def test_the_provider_is_found_and_builds_material(site: Path, tmp_path: Path) -> None:
    program = (
        "from firebuild_pki import installed_providers, open_authority\n"
        f"print(*[one for one in installed_providers() if one.name == {NAME!r}])\n"
        f"with open_authority({{'provider': {NAME!r}}}, build_id='b1') as authority:\n"
        "    print(authority.issue_server().identity, authority.check()[0].about)\n"
    )
    assert checked(PYTHON, "-W", "error", "-c", program, cwd=tmp_path, site=site).splitlines() == [
        "firebuild-pki-acme-ca 0.1.0",
        "b1.firebuild.internal ca",
    ]


@pytest.mark.parametrize("name", ["x", "our-company-issuing-ca-2030"])
def test_the_code_is_tidy(name: str, tmp_path: Path) -> None:
    project = new_plugin(name, tmp_path)
    checked(RUFF, "check", "--no-cache", ".", cwd=project)
    checked(RUFF, "format", "--no-cache", "--check", ".", cwd=project)


def test_the_code_is_typed(project: Path, tmp_path: Path) -> None:
    checked(MYPY, "--cache-dir", str(tmp_path), "src", "tests", cwd=project)


def test_the_prefix_of_the_distribution_may_be_given(tmp_path: Path) -> None:
    assert new_plugin("firebuild-pki-mine", tmp_path) == tmp_path / "firebuild-pki-mine"
    assert (tmp_path / "firebuild-pki-mine/src/firebuild_pki_mine").is_dir()


@pytest.mark.parametrize(
    ("name", "likely"),
    [
        ("", "my-ca"),
        ("My_CA", "my-ca"),
        ("-x", "x"),
        ("x-", "x"),
        ("a--b", "a-b"),
        ("9lives", "lives"),
        ("../x", "x"),
        ("é", "my-ca"),
        ("firebuild-pki-", "my-ca"),
        ("x\n", "x"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused_with_one_that_can(
    name: str, likely: str, tmp_path: Path
) -> None:
    with pytest.raises(CAError, match="expected a name of lower-case letters") as caught:
        new_plugin(name, tmp_path)
    assert str(caught.value.hint).endswith(f'for example "{likely}"')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["provider", "observers", "call-timeout", "firebuild-pki-provider"])
def test_a_setting_is_not_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CAError, match="is a setting of the section ca"):
        new_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_installed_provider_is_not_a_name(tmp_path: Path) -> None:
    with pytest.raises(CAError, match='"embedded" is the name of a plugin of firebuild'):
        new_plugin("embedded", tmp_path)


def test_nor_is_that_of_a_key_store_whose_distribution_it_would_replace(
    install: Install, tmp_path: Path
) -> None:
    install("firebuild-pki-kms", "", name="kms", module="kms_pki", group="firebuild_pki.key_stores")
    with pytest.raises(CAError, match=r'"kms" is the name of a plugin of firebuild-pki-kms 1\.2'):
        new_plugin("kms", tmp_path / "new")


def test_a_missing_directory_is_made(tmp_path: Path) -> None:
    assert (new_plugin(NAME, tmp_path / "a" / "b") / "README.md").exists()


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "firebuild-pki-acme-ca").mkdir()
    assert (new_plugin(NAME, tmp_path) / "README.md").exists()


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    project = tmp_path / "firebuild-pki-acme-ca"
    project.mkdir()
    (project / "notes").touch()
    with pytest.raises(CAError, match="is there already, and not empty"):
        new_plugin(NAME, tmp_path)
    assert [path.name for path in project.iterdir()] == ["notes"]
    assert list(tmp_path.iterdir()) == [project]


def test_a_file_and_a_link_are_left_alone(tmp_path: Path) -> None:
    project = tmp_path / "firebuild-pki-acme-ca"
    project.touch()
    with pytest.raises(CAError, match="is not a directory"):
        new_plugin(NAME, tmp_path)
    project.unlink()
    project.symlink_to("nowhere")
    with pytest.raises(CAError, match="is not a directory"):
        new_plugin(NAME, tmp_path)


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CAError, match=r"cannot write .*: (Not a directory|File exists)"):
        new_plugin(NAME, tmp_path / "file")
    with pytest.raises(CAError, match=r"cannot write .*: File name too long"):
        new_plugin("x" * 300, tmp_path)


def test_a_project_that_cannot_be_finished_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(CAError, match=r"cannot write .*: No space left on device"):
        new_plugin(NAME, tmp_path)
    assert list(tmp_path.iterdir()) == []
