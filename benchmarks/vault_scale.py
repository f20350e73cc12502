"""Certificates from OpenBao: against a plain HTTP client, for many builds, and with a leader that is killed.

    .venv/bin/python benchmarks/vault_scale.py plain [--count 2000]
    .venv/bin/python benchmarks/vault_scale.py node [--builds 1000] [--processes 8]
    .venv/bin/python benchmarks/vault_scale.py cluster [--builds 1000] [--processes 8]

The servers are real ones on this machine, so they share its processors with what is measured.

`plain`: 2,000 guest certificates by 8 threads, from one node. The plain client makes the same keys and CSRs,
POSTs the same JSON with urllib3 over as many connections, and looks at nothing that comes back. Both take
turns in three rounds each; medians, by the clock and by the processor's time of this process.
`node`: builds that log in, issue for server and guest and revoke their token, from one node with raft
storage; once as `vault-setup` prepares it, once with no_store, batch tokens and `issuer` besides.
`cluster`: the same from three nodes, whose leader is killed once half of the builds have begun.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from urllib3 import PoolManager

from firebuild_pki import CASettings, vault_setup
from firebuild_pki.benching import Plan, Work, measure
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.x509 import make_csr

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from baoserver import Api, RaftCluster, create_token

ROUNDS: Final = 3
DIRECTORY: Final = Path(tempfile.mkdtemp())
THREADS: Final = 8
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


def plain(count: int) -> None:
    """Compare with the plain client, in turns."""
    with RaftCluster(scratch(), size=1) as node:
        prepare(node)
        load = partial(settings, node.addresses, "token")
        plan = Plan(Work.GUEST, count, THREADS)

        def framework() -> None:
            found = measure(load, plan)
            assert not found.tally.errors, found.tally.errors
            assert len(found.tally.certificates) == plan.count

        measure(load, Plan(Work.GUEST, THREADS, THREADS))  # imports
        rates: dict[str, list[tuple[float, float]]] = {"firebuild": [], "plain": []}
        for _ in range(ROUNDS):
            for name, action in (
                ("firebuild", framework),
                ("plain", lambda: plain_client(node.addresses[0], plan.count)),
            ):
                began, cpu = time.perf_counter(), time.process_time()
                action()
                rates[name].append(
                    (
                        plan.count / (time.perf_counter() - began),
                        1000 * (time.process_time() - cpu) / plan.count,
                    )
                )
        medians = {
            name: [statistics.median(part) for part in zip(*found, strict=True)]
            for name, found in rates.items()
        }
        for name, (rate, cpu) in medians.items():
            print(f"{name}: {rate:.0f} certificates a second, {cpu:.2f} ms of the processor each")
        print(f"ratio of the throughputs: {medians['firebuild'][0] / medians['plain'][0]:.2f}")


def node(builds: int, processes: int) -> None:
    """Builds from one node, and what stays in its store."""
    for lean in (False, True):
        with RaftCluster(scratch(), size=1) as one:
            prepare(one, lean=lean)
            before = stored(one)
            found = measure(
                partial(settings, one.addresses, lean=lean), Plan(count=builds, processes=processes)
            ).to_json()
            print(json.dumps({"no_store, batch tokens": lean, **found, "stored": growth(one, before)}))


def cluster(builds: int, processes: int) -> None:
    """Builds from three nodes, one of which dies."""
    with RaftCluster(scratch()) as three:
        prepare(three)
        three.wait_replicated()
        before = stored(three)
        found = measure(
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


def scratch() -> Path:
    """A directory for the servers, removed at the end."""
    return DIRECTORY


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
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=("plain", "node", "cluster"))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--builds", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    try:
        if options.case == "plain":
            plain(options.count)
        else:
            {"node": node, "cluster": cluster}[options.case](options.builds, options.processes)
    finally:
        shutil.rmtree(DIRECTORY)


if __name__ == "__main__":
    main()
