"""The host's side of RUN --mount=type=ssh: an agent of the user (sshagent.py) answers the guest."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.wire import MAX_AGENT_MESSAGE, MAX_AGENT_REQUESTS
from firebuild_pki.display import counted, one_line

if TYPE_CHECKING:
    from firebuild_bootstrap.sshagent import SshAgent

_FAILURE = b"\x05"  # SSH_AGENT_FAILURE: also what a client hears of an agent that has gone


class Forwarding:
    """Answers what clients of one RUN ask.

    A user may have to confirm a signature, which takes as long as it takes. So each request has a thread, and
    there are as many at once as a guest may have requests open.

    Args:
        agents: those that the RUN mounts, by id.
        ready: told that there is a reply.
        warn: takes a line for the user, the first time that an agent can't be asked.
    """

    def __init__(
        self, agents: Mapping[str, SshAgent], ready: Callable[[], None], warn: Callable[[str], None]
    ) -> None:
        self._agents = agents
        self._ready = ready
        self._warn = warn
        self._warned = False
        self._lock = threading.Lock()
        self._open = 0
        self._replies: deque[bytes] = deque()
        self._over = threading.Event()

    def close(self) -> None:
        """Answer nothing any more: the RUN is over."""
        with self._lock:
            self._over.set()
            self._replies.clear()

    def ask(self, request: pb.AgentRequest) -> None:
        """Have a request answered; does not wait.

        Raises:
            InputError: the guest may not ask that.
        """
        agent = self._agents.get(request.id)
        if agent is None or self._over.is_set():
            raise InputError(f"the guest asks the SSH agent {request.id!r:.200}, which no RUN at work mounts")
        if not 0 < len(request.message) <= MAX_AGENT_MESSAGE:
            size = len(request.message)
            raise InputError(
                f"the guest asks an SSH agent {counted(size, 'byte')}; "
                f"from 1 to {MAX_AGENT_MESSAGE} are allowed"
            )
        with self._lock:
            if self._open == MAX_AGENT_REQUESTS:
                raise InputError(f"the guest asks SSH agents more than {MAX_AGENT_REQUESTS} things at once")
            self._open += 1
        arguments = (agent, request.id, request.number, request.message)
        threading.Thread(target=self._answer, args=arguments, name="firebuild-agent", daemon=True).start()

    @property
    def has_replies(self) -> bool:
        """Whether `replies` yields something."""
        return bool(self._replies)

    def replies(self) -> Iterator[bytes]:
        """Yield the messages that are ready; each makes room for another request."""
        while True:
            with self._lock:
                if not self._replies:
                    return
                message = self._replies.popleft()
                self._open -= 1
            yield message

    def _answer(self, agent: SshAgent, name: str, number: int, request: bytes) -> None:
        try:
            reply = agent.answer(request, self._over)
        except Exception as error:
            reply = _FAILURE
            self._failed(name, error)
        message = pb.ToGuest(agent_reply=pb.AgentReply(number=number, message=reply)).SerializeToString()
        with self._lock:
            if self._over.is_set():
                return
            self._replies.append(message)
        self._ready()

    def _failed(self, name: str, error: Exception) -> None:
        with self._lock:
            if self._warned or self._over.is_set():
                return
            self._warned = True
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        self._warn(f"--ssh {one_line(name, 80)}: the agent does not answer: {one_line(why, 200)}")
