"""The page on CI is true: its files, its operator's commands and its jobs work as they are printed."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

import pytest

from baoserver import DevServer, JwtIssuer
from pki_ci.conftest import Checkout, Operator
from pki_ci.issuers import AUDIENCE, Endpoint, github_claims, gitlab_claims
from pki_ci.page import PAGE, blocks, github_job, gitlab_job

pytestmark = [pytest.mark.needs("bao"), pytest.mark.xdist_group("vault-in-ci")]

BUILD = "Build the image"


@pytest.mark.needs("userns")
def test_the_job_on_github_builds_its_image(
    checkout: Checkout, operator: Operator, issuers: dict[str, JwtIssuer], vault: DevServer
) -> None:
    operator("github")
    before = certificates(vault)
    job, _ = github_job()
    with Endpoint(issuers["github"], github_claims()).serving() as endpoint:
        ran = checkout.step(job, BUILD, {**endpoint.environ, "GITHUB_RUN_NUMBER": "7"})
    assert ran.status == 0, ran.output
    assert (checkout.directory / "web.ext4").stat().st_size > 1 << 20
    assert len(certificates(vault) - before) >= 2
    (token,) = endpoint.tokens
    masked = f"::add-mask::{token}\n"
    assert masked in ran.output
    assert token not in ran.output.replace(masked, "")
    assert open_tokens(vault, "github") == 0


@pytest.mark.needs("userns")
def test_the_job_on_gitlab_builds_its_image(
    checkout: Checkout, operator: Operator, issuers: dict[str, JwtIssuer], vault: DevServer
) -> None:
    operator("gitlab")
    before = certificates(vault)
    job = gitlab_job()
    ((variable, wanted),) = job.document["id_tokens"].items()
    token = issuers["gitlab"].token(**gitlab_claims(), aud=wanted["aud"])
    ran = checkout.step(job, "script", {variable: token, "CI_PIPELINE_IID": "7"})
    assert ran.status == 0, ran.output
    assert (checkout.directory / "web.ext4").exists()
    assert len(certificates(vault) - before) >= 2
    assert token not in ran.said
    assert open_tokens(vault, "gitlab") == 0


STRANGERS = {
    "another repository": (github_claims(repository="example/other"), "repository"),
    "a fork": (github_claims(repository="stranger/images"), "repository"),
    "another branch": (github_claims(branch="feature"), "ref"),
    "a branch that sounds alike": (github_claims(branch="main-2"), "ref"),
    "a pull request's event": (github_claims(event="pull_request_target"), "event_name"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_job_on_github_is_refused(
    stranger: str, checkout: Checkout, operator: Operator, issuers: dict[str, JwtIssuer]
) -> None:
    operator("github")
    claims, claim = STRANGERS[stranger]
    job, _ = github_job()
    with Endpoint(issuers["github"], claims).serving() as endpoint:
        ran = checkout.step(job, BUILD, {**endpoint.environ, "GITHUB_RUN_NUMBER": "7"})
    assert ran.status == 3, ran.output
    assert "the login with jwt at auth/github/login was refused" in ran.said
    assert f'claim "{claim}" does not match' in ran.said
    assert not (checkout.directory / "web.ext4").exists()


GITLAB_STRANGERS = {
    "another project": (gitlab_claims(project="example/other"), "project_path"),
    "another branch": (gitlab_claims(branch="feature"), "ref"),
    "an unprotected branch": (gitlab_claims(protected="false"), "ref_protected"),
}


@pytest.mark.parametrize("stranger", GITLAB_STRANGERS)
def test_another_job_on_gitlab_is_refused(
    stranger: str, checkout: Checkout, operator: Operator, issuers: dict[str, JwtIssuer]
) -> None:
    operator("gitlab")
    claims, claim = GITLAB_STRANGERS[stranger]
    token = issuers["gitlab"].token(**claims, aud=AUDIENCE)
    ran = checkout.step(gitlab_job(), "script", {"VAULT_JWT": token, "CI_PIPELINE_IID": "7"})
    assert ran.status == 3, ran.output
    assert f'claim "{claim}" does not match' in ran.said


BAD_TOKENS: dict[str, tuple[dict[str, Any], str]] = {
    "for another service": ({"aud": "https://other.example"}, "audience"),
    "of another issuer": ({"iss": "https://issuer.example"}, "issuer"),
    "expired": ({"exp": 1_700_000_000, "nbf": 1_699_990_000, "iat": 1_699_990_000}, "expired"),
}


@pytest.mark.parametrize("flaw", BAD_TOKENS)
def test_a_token_with_a_flaw_is_refused_in_words(
    flaw: str, checkout: Checkout, operator: Operator, issuers: dict[str, JwtIssuer]
) -> None:
    operator("gitlab")
    changes, word = BAD_TOKENS[flaw]
    token = issuers["gitlab"].token(**{**gitlab_claims(), "aud": AUDIENCE, **changes})
    ran = checkout.step(gitlab_job(), "script", {"VAULT_JWT": token, "CI_PIPELINE_IID": "7"})
    assert ran.status == 3, ran.output
    assert word in ran.said
    assert token not in ran.said


def test_a_token_signed_by_another_key_is_refused(checkout: Checkout, operator: Operator) -> None:
    operator("gitlab")
    token = JwtIssuer("https://gitlab.com").token(**gitlab_claims(), aud=AUDIENCE)
    ran = checkout.step(gitlab_job(), "script", {"VAULT_JWT": token, "CI_PIPELINE_IID": "7"})
    assert ran.status == 3, ran.output
    assert "the login with jwt at auth/gitlab/login was refused" in ran.said


def test_a_job_that_may_not_have_a_token_stops_before_the_build(
    checkout: Checkout, issuers: dict[str, JwtIssuer]
) -> None:
    job, _ = github_job()
    with Endpoint(issuers["github"], github_claims()).serving() as endpoint:
        environ = {**endpoint.environ, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "wrong"}
        ran = checkout.step(job, BUILD, environ)
    assert ran.status != 0
    assert "401" in ran.said
    assert "firebuild" not in ran.said


def test_a_job_without_the_permission_is_told_so(checkout: Checkout) -> None:
    ran = checkout.step(github_job()[0], BUILD, {})
    assert ran.status != 0
    assert "this job needs the permission id-token: write" in ran.said
    assert (
        "this job needs the permission id-token: write"
        in PAGE.read_text(encoding="utf-8").partition("fails")[2]
    )


def test_without_a_token_the_variable_is_named(checkout: Checkout) -> None:
    ran = checkout.step(gitlab_job(), "script", {"CI_PIPELINE_IID": "7"})
    assert ran.status == 3, ran.output
    assert "expected a secret in the environment variable VAULT_JWT, but it is not set" in ran.said


def test_what_the_page_shows_of_a_failure_is_what_is_shown(
    checkout: Checkout, operator: Operator, issuers: dict[str, JwtIssuer]
) -> None:
    operator("github")
    job, _ = github_job()
    with Endpoint(issuers["github"], github_claims(branch="feature")).serving() as endpoint:
        ran = checkout.step(job, BUILD, endpoint.environ)
    page = PAGE.read_text(encoding="utf-8")
    _, _, shown = page.partition("```text\n")
    wanted = " ".join(shown.partition("…")[0].split())
    version = firebuild_version()
    said = re.sub(r" \(\d+\.\d s\)", "", ran.said)  # what took long says how long
    assert wanted.replace("0.1.0", version) in said, ran.output


def test_the_laptop_uses_the_same_file_and_no_vault(checkout: Checkout) -> None:
    ran = checkout.run(
        ("sh", "-eu"),
        "firebuild config check\nfirebuild ca check",
        {
            "FIREBUILD_CONFIG": "firebuild.yaml",
        },
    )
    assert ran.status == 0, ran.output
    assert "embedded" in ran.said


def test_the_token_of_a_build_can_do_nothing_else(
    operator: Operator, issuers: dict[str, JwtIssuer], vault: DevServer
) -> None:
    operator("github")
    token = issuers["github"].token(**github_claims(), aud=AUDIENCE)
    login = {"role": "images", "jwt": token}
    auth = vault.anonymous.call("POST", "auth/github/login", login)["auth"]
    assert auth["token_policies"] == ["firebuild"]
    assert auth["lease_duration"] == 3600
    builds = vault.api.with_token(auth["client_token"])
    for path in ("sys/mounts", "sys/auth", "pki/config/urls", "auth/github/role/images", "secret/data/x"):
        assert builds.request("GET", path).status_code == 403, path
    for path in ("pki/issue/firebuild-server", "pki/sign-verbatim", "pki/root/sign-intermediate"):
        assert builds.request("POST", path, {"common_name": "x.firebuild.internal"}).status_code == 403, path


def test_the_workflow_asks_github_for_the_right_to_a_token_and_for_no_other() -> None:
    _, workflow = github_job()
    assert workflow["permissions"] == {"contents": "read", "id-token": "write"}
    # YAML 1.1 reads the key `on` as true
    assert dict[Any, Any](workflow)[True] == {"push": {"branches": ["main"]}}


def test_only_the_environment_makes_a_job_use_vault() -> None:
    for environ in (github_job()[0].environ, gitlab_job().environ):
        assert environ["FIREBUILD_CA__PROVIDER"] == "vault"
        assert set(environ) <= {
            "FIREBUILD_CONFIG",
            "FIREBUILD_CA__PROVIDER",
            "FIREBUILD_CA__VAULT__AUTH__MOUNT",
        }


def test_the_steps_that_cannot_run_here_are_these_and_no_others() -> None:
    job, _ = github_job()
    assert set(job.steps) - {BUILD} == {"Allow sandboxes", "Install firebuild"}
    assert job.steps["Install firebuild"] == "pip install ./firebuild-clone"
    assert job.steps["Allow sandboxes"].count("sudo") == 2
    before = gitlab_job().document["before_script"]
    assert before == [
        "apt-get update && apt-get install --yes uidmap",
        "git clone --depth 1 https://gitlab.example/firebuild.git firebuild-clone",
        "pip install ./firebuild-clone",
    ]


def test_every_file_of_the_page_is_tried() -> None:
    known = {
        "firebuild.yaml",
        "Dockerfile",
        "github",
        "gitlab",
        ".github/workflows/image.yml",
        ".gitlab-ci.yml",
    }
    assert set(blocks()) == known
    fences = PAGE.read_text(encoding="utf-8").count("\n```") // 2
    assert fences == len(known) + 2, "two more are the runner's config.toml and a report"


def firebuild_version() -> str:
    return metadata.version("firebuild")


def certificates(vault: DevServer) -> set[str]:
    """Serial numbers of what the mount has signed; 404 means none."""
    answer = vault.api.request("LIST", "pki/certs")
    return set(answer.json()["data"]["keys"]) if answer.ok else set()


def open_tokens(vault: DevServer, mount: str) -> int:
    """Count the tokens that came from a login and are still valid."""
    found = vault.api.call("LIST", "auth/token/accessors")["data"]["keys"]
    paths = [vault.api.write("auth/token/lookup-accessor", accessor=one).get("path") for one in found]
    return paths.count(f"auth/{mount}/login")
