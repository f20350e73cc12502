"""Many builds at once, in several processes: what one node and a cluster that loses its leader make of them.

`benchmarks/vault.py` does the same with a thousand builds; its figures are in `docs/scale.md`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from baoserver import RaftCluster
from firebuild_bootstrap.cli.bench import bench
from firebuild_bootstrap.errors import ExitStatus
from firebuild_pki import CASettings
from firebuild_pki.benching import Measured, Plan, measure
from pki.tools import ca_settings
from pki_cluster.proxy import Proxy
from pki_cluster.scene import CATALOG, Scene

pytestmark = pytest.mark.needs("bao")

BUILDS = 40


def load(section: dict[str, Any]) -> CASettings:
    """What each process reads."""
    return ca_settings(section, CATALOG)


def all_went_well(found: Measured) -> None:
    assert found.tally.errors == {}
    assert (len(found.tally.builds), len(found.tally.certificates)) == (BUILDS, 2 * BUILDS)


def test_processes_share_the_builds_and_add_up_what_they_took(
    scene: Scene, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in scene.environ.items():
        monkeypatch.setenv(name, value)
    plan = Plan(count=BUILDS, processes=4)
    found = measure(partial(load, scene.section(proxy.address)), plan)
    all_went_well(found)
    told = found.to_json()
    # login, both roles, the issuer, both signatures, the end of the token
    assert told["requests_per_certificate"] == 3.5
    assert told["bytes_received_per_certificate"] > 2000
    assert told["certificate_ms"]["p50"] <= told["certificate_ms"]["p99"] <= told["certificate_ms"]["max"]
    assert told["build_ms"]["p50"] > told["certificate_ms"]["p50"]


@pytest.mark.xdist_group("raft")
def test_no_build_of_any_process_fails_when_the_leader_is_killed(
    cluster: RaftCluster, unique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene.made(cluster.api, unique)
    cluster.wait_replicated()
    for name, value in scene.environ.items():
        monkeypatch.setenv(name, value)
    killed: list[int] = []

    def kill(begun: int) -> None:
        if begun >= BUILDS // 4 and not killed:
            killed.append(begun)
            cluster.leader().kill()

    section = scene.section(cluster.addresses, retry_for="45s", timeout="5s")
    found = measure(partial(load, section), Plan(count=BUILDS, processes=4), on_begun=kill)
    assert killed[0] < BUILDS, "all was over before the leader was killed"
    all_went_well(found)


def test_the_command_says_what_stays_behind_and_what_failed(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in scene.environ.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "firebuild.yaml"

    def run(work: str, *, as_json: bool = False, **options: Any) -> tuple[int, str, str]:
        config.write_text(json.dumps({"ca": scene.section(scene.api.address, **options)}))
        numbers = {"count": 12, "concurrency": 2, "processes": 1}
        status = bench(config, {}, lambda: None, as_json=as_json, work=work, duration=None, **numbers)
        return status, *capsys.readouterr()

    status, out, err = run("build", as_json=True)
    assert (status, json.loads(out)["certificates"]) == (ExitStatus.SUCCESS, 24)
    assert "really issues: up to 24 certificates, through the provider vault" in err
    assert "not revoked (ca.revoke_at_end)" in err
    assert "tidy_cert_store=true" in err
    status, out, err = run("guest", guest_role="nobody")
    assert status == ExitStatus.CERTIFICATE_AUTHORITY
    assert "errors: 12\n  10 x signing the guest certificate was refused" in out
    assert "  2 x a thread gave up after 5 errors in a row" in out
    assert "revocation list grows" in run("server", framework={"revoke_at_end": True})[2]
