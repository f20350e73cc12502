"""What builds cost Vault and a registry is what the page on fleets says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from baoserver import DevServer, JwtIssuer
from baoserver.auth import enable_jwt, write_policy
from baoserver.pki import add_role, mount_pki
from firebuild_bootstrap.home import Home
from registry.servers import CA, Image, small_registry
from support import BIN, REPO, serving


class Counting(ThreadingHTTPServer):
    """Passes requests on to Vault, and remembers them."""

    daemon_threads = True

    def __init__(self, target: str) -> None:
        self.target = target
        self.seen: list[str] = []
        super().__init__(("127.0.0.1", 0), Passing)


class Passing(BaseHTTPRequestHandler):
    server: Counting

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name != "Host"}
        answer = requests.request(
            self.command, self.server.target + self.path, data=body, headers=headers, timeout=30
        )
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.end_headers()
        self.wfile.write(answer.content)

    do_POST = do_PUT = do_GET  # noqa: N815


@contextmanager
def counting(target: str) -> Iterator[Counting]:
    server = Counting(target)
    with serving(server):
        yield server


DOCKERFILE = """\
FROM {base} AS build
RUN echo made > /made
FROM {base}
COPY --from=build /made /made
RUN cat /made > /read
"""


@pytest.mark.needs("bao", "userns")
def test_what_a_build_costs_is_what_the_page_says(tmp_path: Path, vault: DevServer) -> None:
    mount_pki(vault.api, "fleet")
    for use in ("server", "guest"):
        add_role(vault.api, f"fleet-{use}", mount="fleet", use="server" if use == "server" else "client")
    issuer = JwtIssuer()
    # The smallest policy of docs/providers/vault.md.
    [policy] = re.findall(r"```hcl\n(.*?)```", (REPO / "docs/providers/vault.md").read_text(), re.DOTALL)
    rules = policy.replace("pki/", "fleet/").replace("/firebuild-", "/fleet-")
    enable_jwt(vault.api, issuer, write_policy(vault.api, "fleet", rules), mount="fleet-jwt")
    host = tmp_path / "host"
    archive = Home(host).bases.create_from_host("host").archive
    ca = CA.made(tmp_path)
    with counting(vault.address) as bao, small_registry(ca.server_context()) as registry:
        registry.add(Image((archive.read_bytes(),)), "base")
        base, ref = f"{registry.host}/base:base", f"{registry.host}/web:cache"
        (tmp_path / "Dockerfile").write_text(DOCKERFILE.format(base=base))
        auth = {"method": "jwt", "role": "builds", "mount": "fleet-jwt", "jwt": {"env": "JWT"}}
        roles = {"server_role": "fleet-server", "guest_role": "fleet-guest", "mount": "fleet"}
        settings = {
            "ca": {
                "provider": "vault",
                "vault": {"address": f"http://127.0.0.1:{bao.server_address[1]}", "auth": auth, **roles},
            },
            "registries": {"hosts": {registry.host: {"ca_file": str(ca.certificate)}}},
            "cache": {"import_from": [ref], "export_to": [f"type=registry,ref={ref},mode=max"]},
        }
        (tmp_path / "firebuild.yml").write_text(json.dumps(settings))

        def build(store: str) -> tuple[list[str], dict[str, int]]:
            bao.seen.clear()
            registry.requests.clear()
            jwt = issuer.token(sub="me", aud="https://vault.example")
            environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "JWT": jwt}
            environ |= {"FIREBUILD_HOME": str(tmp_path / store)}
            command = [
                str(BIN / "firebuild"),
                "build",
                "--config",
                str(tmp_path / "firebuild.yml"),
                "-t",
                "web:1",
            ]
            done = subprocess.run(
                [*command, str(tmp_path)], env=environ, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            asked: dict[str, int] = {"base": 0, "cache": 0}
            for path in registry.asked():
                asked["base" if "/base/" in path else "cache"] += 1
            return list(bao.seen), asked

        layers, stages, blobs = 3, 2, 4  # with that of the records
        seen, asked = build("a")
        assert len(seen) == 8 + stages, seen
        assert asked == {"base": 3, "cache": 1 + 1 + 3 * blobs + 1}
        seen, asked = build("b")
        assert seen == []
        assert asked == {"base": 3, "cache": 2 + (layers - 1) + 1}
        seen, asked = build("b")
        assert (seen, asked) == ([], {"base": 0, "cache": 1 + 1})
