"""Certificates from OpenBao, against a plain HTTP client.

2,000 guest certificates by 8 threads, from one node with raft storage. The plain client makes the same keys
and CSRs, POSTs the same JSON with urllib3 over as many connections, and looks at nothing that comes back;
firebuild verifies each certificate besides: its path, names, key and use. The node is a real one on this
machine, so it shares the processors with both clients, and what the path validation and the checks take is
missing on the server. [At scale](../docs/scale.md) says what many builds at once ask of a node, and of
three whose leader is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

from urllib3 import PoolManager

from baoserver import Api, RaftCluster, create_token
from benchmarks.shape import Benchmark, Row, Run
from firebuild_pki import CASettings, vault_setup
from firebuild_pki.benching import Plan, Work
from firebuild_pki.benching import measure as issue
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.x509 import make_csr

COUNT: Final = 2000
THREADS: Final = 8
CLOCK: Final = Row(
    f"{COUNT:,} certificates by {THREADS} threads, one OpenBao node", "plain HTTP client", goal=1.11
)
CPU: Final = Row("the same, the processor on this side", "plain HTTP client", "s CPU")
BAO: Final = Path(sys.executable).parent / "bao"
LEAN: Final = (
    "patch pki/roles/server no_store=true",
    "patch pki/roles/guest no_store=true",
    "write auth/approle/role/firebuild token_type=batch",
)
"""What makes the second column of the table in docs/scale.md, besides the setting `issuer`."""


def prepare(nodes: RaftCluster, *, lean: bool = False) -> None:
    """Have the script of `vault-setup` make CA, roles, policy and AppRole; secrets go to the environment."""
    environ = {**os.environ, "VAULT_ADDR": nodes.addresses[0], "VAULT_TOKEN": nodes.api.token}
    environ |= {"BAO_TOKEN": nodes.api.token, "VAULT_CLI": str(BAO)}

    def run(script: str) -> dict[str, str]:
        done = subprocess.run(["sh"], input=script, env=environ, text=True, check=True, capture_output=True)
        return dict(line.split(": ") for line in done.stdout.splitlines() if ": " in line)

    login = run(vault_setup(settings(nodes.addresses, lean=lean)))
    if lean:
        run("".join(f'"$VAULT_CLI" {command} >/dev/null\n' for command in LEAN))
    token = create_token(nodes.api, "firebuild")
    os.environ.update(ROLE_ID=login["role_id"], SECRET_ID=login["secret_id"], TOKEN=token)


def settings(addresses: list[str], auth: str = "approle", *, lean: bool = False) -> CASettings:
    """The section `ca`, patient enough for an election."""
    logins = {
        "approle": {"method": "approle", "role_id": {"env": "ROLE_ID"}, "secret_id": {"env": "SECRET_ID"}},
        "token": {"method": "token", "token": {"env": "TOKEN"}},
    }
    block = {
        "address": addresses,
        "server_role": "server",
        "guest_role": "guest",
        "retry_for": "45s",
        "timeout": "5s",
        "auth": logins[auth],
        **({"issuer": "default"} if lean else {}),
    }
    return CASettings.model_validate({"provider": "vault", "vault": block})


def plain_client(address: str, count: int) -> None:
    """Make keys and CSRs, and have them signed by as many threads, with nothing but an HTTP client."""
    pool = PoolManager(maxsize=THREADS)
    headers = {"X-Vault-Token": os.environ["TOKEN"], "Content-Type": "application/json"}

    def one(number: int) -> None:
        name = f"guest.b{number}.firebuild.internal"
        key = generate_key()
        body = {
            "csr": make_csr(key, (name,)).decode(),
            "alt_names": name,
            "ttl": "3600s",
            "format": "pem",
        }
        answer = pool.request("POST", f"{address}/v1/pki/sign/guest", body=json.dumps(body), headers=headers)
        assert answer.status == 200, answer.data
        assert json.loads(answer.data)["data"]["certificate"]
        private_key_pem(key)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(one, range(count)))


def measure(run: Run) -> None:
    """Have certificates signed by both, in turns."""
    with mock.patch.dict(os.environ), RaftCluster(run.directory, size=1) as node:
        prepare(node)
        load = partial(settings, node.addresses, "token")

        def framework(count: int = COUNT) -> None:
            found = issue(load, Plan(Work.GUEST, count, THREADS))
            assert not found.tally.errors, found.tally.errors
            assert len(found.tally.certificates) == count

        framework(THREADS)  # imports
        for _ in range(run.rounds):
            ours, theirs = cost(framework), cost(lambda: plain_client(node.addresses[0], COUNT))
            run.add(CLOCK, ours[0], theirs[0])
            run.add(CPU, ours[1], theirs[1])


def cost(action: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds of an action, by the clock and by the processor's time of this process."""
    began, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - began, time.process_time() - cpu


BENCHMARK: Final = Benchmark("vault", __doc__, (CLOCK, CPU), measure, rounds=3, needs=("bao",))


# --- many builds: docs/scale.md ------------------------------------------------------------------


def node(directory: Path, builds: int, processes: int) -> None:
    """Builds from one node, and what stays in its store."""
    for lean in (False, True):
        with RaftCluster(directory, size=1) as one:
            prepare(one, lean=lean)
            before = stored(one)
            found = issue(
                partial(settings, one.addresses, lean=lean), Plan(count=builds, processes=processes)
            ).to_json()
            print(json.dumps({"no_store, batch tokens": lean, **found, "stored": growth(one, before)}))


def cluster(directory: Path, builds: int, processes: int) -> None:
    """Builds from three nodes, one of which dies."""
    with RaftCluster(directory) as three:
        prepare(three)
        three.wait_replicated()
        before = stored(three)
        found = issue(
            partial(settings, three.addresses),
            Plan(count=builds, processes=processes),
            on_begun=killing(three, builds // 2),
        ).to_json()
        assert len(three.running) == len(three.nodes) - 1, "the leader was not killed"
        print(json.dumps({**found, "stored": growth(three, before)}))


def killing(nodes: RaftCluster, after: int) -> Callable[[int], None]:
    """Return what kills the leader, once, when so many builds have begun."""

    def on_begun(begun: int) -> None:
        if begun >= after and len(nodes.running) == len(nodes.nodes):
            nodes.leader().kill()

    return on_begun


def stored(nodes: RaftCluster) -> dict[str, int]:
    """Count what a node keeps: certificates, token accessors, bytes of its files."""
    api = nodes.api
    files = (nodes.leader().directory / "data").rglob("*")
    return {
        "certificates": len(listed(api, "pki/certs")),
        "tokens": len(listed(api, "auth/token/accessors")),
        "bytes": sum(file.stat().st_blocks * 512 for file in files if file.is_file()),
    }


def listed(api: Api, path: str) -> list[Any]:
    """List keys; none where there are none."""
    answer = api.request("LIST", path)
    return list(answer.json()["data"]["keys"]) if answer.ok else []


def growth(nodes: RaftCluster, before: dict[str, int]) -> dict[str, int]:
    """Return what was added."""
    return {name: count - before[name] for name, count in stored(nodes).items()}


def main() -> None:
    """Print what builds meet that log in, issue for server and guest and revoke their token.

    `node`: from one node, as `vault-setup` prepares it, and with no_store, batch tokens and `issuer` besides.
    `cluster`: from three nodes, whose leader is killed once half of the builds have begun.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=("node", "cluster"))
    parser.add_argument("--builds", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        {"node": node, "cluster": cluster}[options.case](Path(directory), options.builds, options.processes)


if __name__ == "__main__":
    main()
