"""A cluster loses its leader while many builds want certificates: none of them fails for it."""

from __future__ import annotations

from functools import partial

import pytest

from baoserver import RaftCluster
from pki_cluster.proxy import Proxy
from pki_cluster.scene import Builds, Scene, failing

pytestmark = [pytest.mark.long, pytest.mark.needs("bao"), pytest.mark.xdist_group("raft")]

PATIENT = {"retry_for": "45s", "timeout": "5s"}


@pytest.fixture
def clustered(cluster: RaftCluster, unique: str) -> Scene:
    """A CA that is replicated to all nodes."""
    scene = Scene.made(cluster.api, unique)
    cluster.wait_replicated()
    return scene


def start_builds(builds: Builds, cluster: RaftCluster, scene: Scene, balancer: Proxy) -> None:
    """Four builds that know all nodes, four behind a load balancer, four that know one standby."""
    standby = cluster.standbys()[0].address
    for address in (cluster.addresses, balancer.address, standby):
        builds.start(4, partial(scene.open, address, **PATIENT))


def test_no_build_fails_when_the_leader_is_killed(cluster: RaftCluster, clustered: Scene) -> None:
    builds = Builds(rounds=8)
    with Proxy(*(node.port for node in cluster.nodes)) as balancer:
        start_builds(builds, cluster, clustered, balancer)
        builds.wait_for(24)
        issued = len(builds.serials)
        cluster.leader().kill()
        builds.finish()
    assert issued < len(builds.serials), "all was over before the leader was killed"
    assert len(set(builds.serials)) == 12 * 8 * 2


def test_no_build_fails_when_the_leader_steps_down(cluster: RaftCluster, clustered: Scene) -> None:
    builds = Builds(rounds=4)
    with Proxy(*(node.port for node in cluster.nodes)) as balancer:
        start_builds(builds, cluster, clustered, balancer)
        builds.wait_for(24)
        first = cluster.leader()
        first.api.call("PUT", "sys/step-down")
        builds.finish()
    assert len(set(builds.serials)) == 12 * 4 * 2


def test_without_a_majority_the_build_ends_in_words(cluster: RaftCluster, clustered: Scene) -> None:
    with clustered.open(cluster.addresses, retry_for="3s", timeout="2s") as authority:
        authority.issue_server()
        last, *others = cluster.standbys()
        for node in (cluster.leader(), *others):
            node.kill()
        with failing() as failure:
            authority.issue_guest()
    assert failure.seconds < 15
    assert all(address in failure.text for address in cluster.addresses), failure.text
    assert "connection refused" in failure.text
    assert last.process.is_alive
