"""The recipes are true: their jobs are what each system reads, and their commands build, as a plain user."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from hcl2.api import loads as read_hcl

from baoserver import DevServer, JwtIssuer
from baoserver.pki import add_role
from firebuild_bootstrap.settings import load_settings
from firebuild_pki import check_settings, parse_document
from pages.blocks import parse
from pki_ci.conftest import Checkout, Operator
from pki_ci.issuers import AUDIENCE, Endpoint, github_claims, gitlab_claims
from pki_ci.page import fenced
from registry.servers import AUTH, CA, debian_registry
from support import BIN, REPO

RECIPES = REPO / "docs/recipes"
pytestmark = pytest.mark.xdist_group("vault-in-ci")


def recipe(name: str) -> dict[str, str]:
    """The files of a recipe by their names."""
    return fenced(RECIPES / f"{name}.md")


def job_of(name: str) -> Any:
    """The job of a recipe, read as YAML 1.2 or HCL."""
    if name == "nomad":
        return read_hcl(recipe(name)["image.nomad.hcl"])
    files = {"github": ".github/workflows/image.yml", "gitlab": ".gitlab-ci.yml", "kubernetes": "job.yaml"}
    return parse_document(recipe(name)[files[name]]).data


# --- what each system reads -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "schema", "mistake"),
    [
        ("github", "github-workflows", ("jobs", "image", "run-on")),
        ("gitlab", "gitlab-ci", ("web-image", "scripts")),
    ],
)
def test_the_job_is_one_that_the_ci_system_takes(name: str, schema: str, mistake: tuple[str, ...]) -> None:
    folder = resources.files("check_jsonschema") / "builtin_schemas/vendor"
    document, rules = job_of(name), json.loads((folder / f"{schema}.json").read_text())
    jsonschema.validate(document, rules)
    *parents, last = mistake
    below = document
    for parent in parents:
        below = below[parent]
    below[last] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, rules)


def test_the_job_of_kubernetes_is_one_that_the_cluster_takes() -> None:
    document = job_of("kubernetes")
    for version in ("1.33", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(document, version, strict=True)
    document["spec"]["template"]["spec"]["hostUser"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.33", strict=True)


def nomad_task() -> dict[str, Any]:
    """The task, whose blocks that come once are lists of one."""
    ((_, job),) = job_of("nomad")["job"][0].items()
    ((_, group),) = job["group"][0].items()
    ((_, task),) = group["task"][0].items()
    return dict(task)


def test_the_task_of_nomad_has_a_user_an_identity_for_vault_and_secrets_that_only_he_reads() -> None:
    task = nomad_task()
    assert task["user"] == "builder"
    [identity] = task["identity"]
    assert (identity["aud"], identity["file"]) == ([AUDIENCE], True)
    [environ] = task["env"]
    assert environ["FIREBUILD_CA__VAULT__AUTH__JWT__FILE"].endswith(f"/nomad_{identity['name']}.jwt")
    [template] = task["template"]
    assert template["perms"] == "0600"
    assert environ["REGISTRY_AUTH_FILE"].endswith(f"/{Path(template['destination']).name}")
    [config] = task["config"]
    assert config["command"].startswith("/"), "raw_exec takes absolute paths"


def environ_of(name: str) -> dict[str, str]:
    """What a job sets."""
    job = job_of(name)
    if name == "github":
        return dict(job["jobs"]["image"]["env"])
    if name == "gitlab":
        return dict(job["web-image"]["variables"])
    if name == "nomad":
        return dict(nomad_task()["env"][0])
    return {each["name"]: each["value"] for each in pod()["containers"][0]["env"]}


def pod() -> dict[str, Any]:
    return dict(job_of("kubernetes")["spec"]["template"]["spec"])


FLEET = fenced(REPO / "docs/fleet.md")["firebuild.yaml"]


@pytest.mark.parametrize("name", ["github", "gitlab", "nomad", "kubernetes"])
def test_what_a_job_sets_completes_the_settings_of_the_fleet(name: str, tmp_path: Path) -> None:
    file = tmp_path / "firebuild.yaml"
    file.write_text(FLEET)
    environ = {**environ_of(name), "VAULT_JWT": "x"}
    settings = load_settings(file, environ)
    assert not [note for note in check_settings(settings.ca, environ) if note.fatal]
    assert settings.cache.import_from == ("registry.example/team/web:cache",)
    auth = (settings.ca.model_extra or {})["vault"].auth
    assert auth.method == ("kubernetes" if name == "kubernetes" else "jwt")


def test_the_commands_that_are_lists_of_words_are_those_of_the_parser() -> None:
    [config] = nomad_task()["config"]
    parse(config["args"])
    program, *words = pod()["containers"][0]["command"]
    assert program == "firebuild"
    parse(words)


@pytest.mark.needs("userns")
def test_the_dockerfile_of_the_tools_has_no_mistake(tmp_path: Path) -> None:
    dockerfile = recipe("kubernetes")["tools/Dockerfile"]
    (tmp_path / "Dockerfile").write_text(dockerfile)
    (base,) = re.findall("FROM (.*)", dockerfile)
    (tmp_path / "empty").mkdir()
    environ = {
        "PATH": os.environ["PATH"],
        "FIREBUILD_HOME": str(tmp_path / "home"),
        "FIREBUILD_PULL": "never",
    }
    for words in (("base", "import", base, "empty"), ("build", "--check", ".")):
        command = [str(BIN / "firebuild"), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "no warnings found" in done.stdout + done.stderr


# --- what their commands do -------------------------------------------------------------------------


@dataclass
class Builder:
    """A plain user with an empty home and a checkout, and nothing else.

    Args:
        home: HOME; the checkout is `web` in it.
        environ: what the CI system sets.
    """

    home: Path
    environ: dict[str, str] = field(default_factory=dict)

    def run(self, command: list[str], directory: Path) -> tuple[int, str]:
        user = pwd.getpwnam("tester")
        subprocess.run(["chown", "-R", "tester:", self.home], check=True)
        done = subprocess.run(
            command,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            cwd=directory,
            env={"PATH": f"{self.home}/bin:/usr/bin:/bin", "HOME": str(self.home), **self.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="session")
def program(public_packages: str) -> Iterator[str]:
    """The script `firebuild` of a plain user, which keeps what Python compiles."""
    with tempfile.TemporaryDirectory(dir="/tmp") as compiled:
        Path(compiled).chmod(0o777)
        yield (
            f"#!/bin/sh\nPYTHONPYCACHEPREFIX={compiled} PYTHONPATH={public_packages} "
            f"exec /usr/bin/python3.{sys.version_info.minor} -sSP -c "
            "'from firebuild_bootstrap.cli import main; main()' \"$@\"\n"
        )


@contextmanager
def builder(files: Mapping[str, str], program: str) -> Iterator[Builder]:
    """Give a user with a checkout of these files and busybox, and `firebuild` in his PATH."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:
        home = Path(name)
        (home / "bin").mkdir()
        (home / "bin/firebuild").write_text(program)
        (home / "bin/firebuild").chmod(0o755)
        for path, text in files.items():
            file = home / "web" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        shutil.copy(str(shutil.which("busybox")), home / "web/busybox")
        yield Builder(home)
        subprocess.run(["rm", "-rf", "--", home], check=False)  # as root: files of other owners


DOCKERFILE = """\
FROM scratch
COPY busybox /bin/sh
RUN ["/bin/sh", "-c", "echo executed here; echo made > /made"]
"""


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory, vault: DevServer, operator: Operator) -> Iterator[str]:
    """A registry whose certificate Vault has signed."""
    operator("github")
    add_role(vault.api, "registry", use="server", suffix="localhost", allow_bare_domains=True, key_type="ec")
    issued = vault.api.write("pki/issue/registry", common_name="localhost", ttl="1h")
    ca = CA(tmp_path_factory.mktemp("registry"))
    ca.pair[0].write_text("\n".join([issued["certificate"], *issued.get("ca_chain", [])]))
    ca.pair[1].write_text(issued["private_key"])
    with debian_registry(ca.directory, ca) as host:
        yield host


def placed(text: str, registry: str, vault: DevServer) -> str:
    """The text of a recipe with the addresses of here."""
    return text.replace("https://vault.example:8200", vault.address).replace("registry.example", registry)


@pytest.fixture(scope="session")
def nomad(tmp_path_factory: pytest.TempPathFactory, vault: DevServer, operator: Operator) -> JwtIssuer:
    """A signer of identities that Vault knows, by the commands of the recipe; its keys are in a file."""
    operator("github")
    issuer = JwtIssuer("https://nomad.example")
    place = Checkout(tmp_path_factory.mktemp("nomad"), tmp_path_factory.mktemp("home"))
    (place.directory / "keys.pem").write_text(issuer.public_key_pem)
    (place.directory / "firebuild.yaml").write_text(placed(FLEET, "localhost:1", vault))
    addresses = re.compile(r"jwks_url=\S+ \\\n +jwt_supported_algs=\S+")
    script, count = addresses.subn("jwt_validation_pubkeys=@keys.pem", recipe("nomad")["nomad"])
    assert count == 1
    environ = {"VAULT_ADDR": vault.address, "BAO_ADDR": vault.address, "BAO_TOKEN": vault.root_token}
    ran = place.run(("sh", "-eu"), script, {**environ, "VAULT_JWT": "x"})
    assert ran.status == 0, ran.output
    return issuer


LOGIN = json.dumps({"auths": {"HOST": {"auth": AUTH}}})


class System:
    """Runs the job of one recipe as the system does that it is for."""

    def __init__(self, registry: str, vault: DevServer) -> None:
        self.registry = registry
        self.vault = vault
        self.login = LOGIN.replace("HOST", registry)

    def here(self, text: str) -> str:
        return placed(text, self.registry, self.vault)

    def github(self, one: Builder, issuer: JwtIssuer) -> tuple[int, str]:
        job = job_of("github")["jobs"]["image"]
        script = next(step["run"] for step in job["steps"] if step.get("name") == "Build and push")
        (one.home / ".docker").mkdir()
        (one.home / ".docker/config.json").write_text(self.login)  # of docker/login-action
        (one.home / "step.sh").write_text(self.here(script))
        with Endpoint(issuer, github_claims()).serving() as endpoint:
            one.environ = {**job["env"], **endpoint.environ, "GITHUB_RUN_NUMBER": "7"}
            shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail"]
            return one.run([*shell, str(one.home / "step.sh")], one.home / "web")

    def gitlab(self, one: Builder, issuer: JwtIssuer) -> tuple[int, str]:
        job = job_of("gitlab")["web-image"]
        ((variable, wanted),) = job["id_tokens"].items()
        one.environ = {**job["variables"], "DOCKER_AUTH_CONFIG": self.login, "CI_PIPELINE_IID": "7"}
        one.environ[variable] = issuer.token(**gitlab_claims(), aud=wanted["aud"])
        script = self.here("\n".join(job["script"]))
        return one.run(["bash", "-eo", "pipefail", "-c", script], one.home / "web")

    def nomad(self, one: Builder, issuer: JwtIssuer) -> tuple[int, str]:
        task = nomad_task()
        [config], [environ] = task["config"], task["env"]
        secrets = one.home / "secrets"
        secrets.mkdir(mode=0o700)
        claims: dict[str, Any] = {
            "nomad_namespace": "default",
            "nomad_job_id": "web-image",
            "nomad_task": "build",
        }
        sub = "global:default:web-image:build:build:vault"
        for name, text in (
            ("nomad_vault.jwt", issuer.token(**claims, sub=sub, aud=AUDIENCE)),
            ("auth.json", self.login),
        ):
            (secrets / name).write_text(text)
            (secrets / name).chmod(0o600)
        known = {"NOMAD_TASK_DIR": one.home, "NOMAD_SECRETS_DIR": secrets, "NOMAD_META_number": 7}

        def filled(text: str) -> str:
            return re.sub(r"\$\{(\w+)\}", lambda found: str(known[found[1]]), self.here(text))

        one.environ = {name: filled(value) for name, value in environ.items()}
        one.environ["FIREBUILD_HOME"] = str(one.home / "store")  # that of the client is kept
        program = Path(config["command"]).name
        return one.run([str(one.home / "bin" / program), *map(filled, config["args"])], one.home)


@pytest.mark.needs("bao", "tester", "userns", "busybox", "docker-registry")
def test_plain_users_build_with_vault_and_find_the_cache_of_those_before(
    vault: DevServer,
    registry: str,
    nomad: JwtIssuer,
    operator: Operator,
    issuers: dict[str, JwtIssuer],
    program: str,
) -> None:
    operator("gitlab")
    system = System(registry, vault)
    files = {"firebuild.yaml": system.here(FLEET), "Dockerfile": DOCKERFILE}
    for run, issuer in (
        (system.github, issuers["github"]),
        (system.gitlab, issuers["gitlab"]),
        (system.nomad, nomad),
    ):
        with builder(files, program) as one:
            status, output = run(one, issuer)
        assert status == 0, output
        assert re.search(rf"pushed {registry}/team/web:7 as sha256:\w+", output)
        cached = f"CACHED from {registry}/team/web:cache" in output
        assert cached is (run != system.github), output


# --- what the pod needs -----------------------------------------------------------------------------


# A range of ids of the node that nobody has, as the kubelet takes one for each pod without the node's users.
FIRST, COUNT = 3_000_000, 65_536
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list"]  # of containerd's defaults
POD = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "chown", "5:5", "/bin/busybox"]
"""


def container(context: dict[str, Any], work: Path, packages: str) -> dict[str, Any]:
    """What the kubelet has the runtime make of a pod with `hostUsers: false` and this security context.

    https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md; the programs are those of here.
    """
    capabilities = [f"CAP_{name}" for name in context["capabilities"]["add"]]
    user = context["runAsUser"]
    held = capabilities if user == 0 else []
    of_here = ["/usr", "/etc", *packages.split(os.pathsep), str(work)]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": user, "gid": user},
            "args": ["/bin/sh", f"{work}/bin/firebuild", "build", "--progress", "plain", f"{work}/web"],
            "env": ["PATH=/usr/bin:/usr/sbin", f"HOME={work}"],
            "cwd": str(work),
            "capabilities": {"bounding": capabilities, "effective": held, "permitted": held},
            "noNewPrivileges": not context["allowPrivilegeEscalation"],
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            *(
                {"destination": path, "source": path, "type": "bind", "options": ["rbind", "rw"]}
                for path in of_here
            ),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "user", "network")],
            "uidMappings": [{"containerID": 0, "hostID": FIRST, "size": COUNT}],
            "gidMappings": [{"containerID": 0, "hostID": FIRST, "size": COUNT}],
            "maskedPaths": [] if context["procMount"] == "Unmasked" else MASKED,
        },
    }


@pytest.mark.needs("root", "runc", "userns", "busybox", "tester")
@pytest.mark.parametrize(
    ("less", "words"),
    [
        ({}, ""),
        ({"procMount": "Default"}, "procMount: Unmasked"),
        ({"capabilities": {"add": ["SETUID", "SETGID"]}}, "SETUID, SETGID and SETFCAP"),
        ({"runAsUser": 1000}, "chown"),
    ],
    ids=["as-printed", "masked-proc", "without-setfcap", "another-user"],
)
def test_the_pod_can_build_with_what_it_asks_for_and_with_nothing_less(
    less: dict[str, Any], words: str, program: str, public_packages: str
) -> None:
    [each] = pod()["containers"]
    context = {**each["securityContext"], **less}
    with builder({"Dockerfile": POD}, program) as one:
        subprocess.run(["chown", "-R", f"{FIRST}:{FIRST}", one.home], check=True)
        one.home.chmod(0o777)
        with tempfile.TemporaryDirectory(dir="/tmp") as bundle:
            Path(bundle).chmod(0o755)
            root = Path(bundle, "rootfs")
            for name in ("bin", "sbin", "lib", "lib64"):
                root.mkdir(exist_ok=True)
                (root / name).symlink_to(f"usr/{name}")
            shutil.chown(root, FIRST, FIRST)
            Path(bundle, "config.json").write_text(json.dumps(container(context, one.home, public_packages)))
            command = ["runc", "--root", f"{bundle}/state", "run", "--bundle", bundle, one.home.name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (not less), output
    assert words in output
