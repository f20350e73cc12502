"""Three servers with replicated storage (raft), as in production."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from baoserver.api import Api
from baoserver.server import StoredServer, wait_until


class Node(StoredServer):
    """A member of a cluster. It finds the others by itself (retry_join).

    Args:
        parent: where its own directory is made.
        founder: the node that the cluster began with; None for that one itself.
    """

    def __init__(self, parent: Path | None = None, *, founder: Node | None = None) -> None:
        super().__init__(parent, storage="raft")
        self._founder = founder

    def start(self) -> Self:
        """Start it, unseal it, wait until it is leader or follows one."""
        if not self._founder:
            return super().start()
        self.start_joining()
        self.finish_joining()
        return self

    def start_joining(self) -> None:
        """Start it, without waiting until it belongs to the cluster."""
        super(StoredServer, self).start()
        if self._founder:
            self.unseal_key, self._root_token = self._founder.unseal_key, self._founder.root_token

    def finish_joining(self) -> None:
        """Send the unseal key until the node has joined and is unsealed."""
        wait_until(self._unsealed, "unsealed", lambda: self.log)
        self.wait_ready()

    def unseal(self) -> None:
        """Unseal it and wait until it is leader or follows one."""
        self.finish_joining()

    def wait_ready(self) -> None:
        """Wait until it is leader, or knows one."""
        wait_until(self._is_ready, "a leader", lambda: self.log)

    @property
    def is_leader(self) -> bool:
        """Whether it is the one that writes."""
        return bool(self._leader().get("is_self"))

    @property
    def applied_index(self) -> int:
        """How much of the cluster's history it has applied."""
        return int(self._leader()["raft_applied_index"])

    def _leader(self) -> dict[str, Any]:
        return self.anonymous.call("GET", "sys/leader")

    def _unsealed(self) -> bool:
        return not self.is_sealed or (self.send_unseal_key() and not self.is_sealed)

    def _is_ready(self) -> bool:
        answer = self.anonymous.request("GET", "sys/health?standbyok=true")
        return answer.ok and bool(self._leader().get("leader_address"))

    def _storage_settings(self) -> dict[str, Any]:
        # Promotes a new node to a voter at once instead of after ten seconds.
        often = {"autopilot_reconcile_interval": "500ms", "autopilot_update_interval": "500ms"}
        settings = {**super()._storage_settings(), **often}
        if self._founder:
            settings["retry_join"] = [{"leader_api_addr": self._founder.address}]
        return settings


class RaftCluster:
    """Three nodes, all unsealed, all voters. Use it in a ``with`` block.

    Args:
        parent: where the nodes' directories are made.
        size: number of nodes; an odd one.
    """

    def __init__(self, parent: Path | None = None, *, size: int = 3) -> None:
        founder = Node(parent)
        self.nodes: Sequence[Node] = [founder, *(Node(parent, founder=founder) for _ in range(size - 1))]
        self._stack = ExitStack()

    @property
    def addresses(self) -> list[str]:
        """URLs of all nodes, running or not."""
        return [node.address for node in self.nodes]

    @property
    def running(self) -> list[Node]:
        """The nodes whose process runs."""
        return [node for node in self.nodes if node.process.is_alive]

    @property
    def api(self) -> Api:
        """The leader's API, with the root token."""
        return self.leader().api

    def leader(self) -> Node:
        """Return the node that writes; wait for an election."""
        wait_until(lambda: any(node.is_leader for node in self.running), "a leader", self._logs)
        return next(node for node in self.running if node.is_leader)

    def standbys(self) -> list[Node]:
        """Return the running nodes that follow the leader."""
        leader = self.leader()
        return [node for node in self.running if node is not leader]

    def wait_replicated(self) -> None:
        """Wait until every running node knows what the leader knows; standbys answer reads themselves."""
        wanted = self.leader().applied_index
        wait_until(
            lambda: all(node.applied_index >= wanted for node in self.running), "replication", self._logs
        )

    def heal(self) -> None:
        """Start every node that was killed, and wait until all vote."""
        for node in self.nodes:
            if not node.process.is_alive:
                node.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until all nodes vote and know the leader."""
        wait_until(lambda: self._voters() == len(self.nodes), "all nodes vote", self._logs)
        for node in self.nodes:
            node.wait_ready()

    def __enter__(self) -> Self:
        with self._stack:
            founder, *others = (self._stack.enter_context(_Closing(node)) for node in self.nodes)
            founder.start()
            founder.api.write(
                "sys/storage/raft/autopilot/configuration",
                server_stabilization_time="500ms",
                last_contact_threshold="2s",
            )
            for node in others:
                node.start_joining()
            for node in others:
                node.finish_joining()
            self.wait_ready()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            print(self._logs())
        self._stack.close()

    def _voters(self) -> int:
        found = self.api.read("sys/storage/raft/configuration")["config"]["servers"]
        return sum(bool(server["voter"]) for server in found)

    def _logs(self) -> str:
        return "\n".join(f"log of the node at {node.address}:\n{node.log}" for node in self.nodes)


class _Closing:
    def __init__(self, node: Node) -> None:
        self._node = node

    def __enter__(self) -> Node:
        return self._node

    def __exit__(self, *_: object) -> None:
        self._node.close()
