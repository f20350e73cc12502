"""One build, seen from the machine: fetch the commands, execute them, report the end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from firebuild_bootstrap import wire

from .client import CALL_SECONDS, Client
from .errors import GuestError, InputError, Interrupted, complain
from .kernel import hide_memory
from .stop import Stop
from .stream import NoSession, Session, join

if TYPE_CHECKING:
    from firebuild_bootstrap.legacy.old_server import OldServer

    from .enter import Launcher
    from .overlay import Layers

_CLOCK_TOLERANCE = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def read_block(document: Mapping[str, Any]) -> wire.BootstrapBlock:
    """Read the Bootstrap block of the metadata.

    Raises:
        InputError: it is missing or incomplete.
    """
    block = document.get("Bootstrap")
    if not isinstance(block, dict):
        raise InputError("the metadata has no Bootstrap block: there is no build to join")
    try:
        return wire.BootstrapBlock.from_json(block)
    except wire.WireError as error:
        raise InputError(str(error)) from error


def bootstrap(
    block: wire.BootstrapBlock,
    root_path: str,
    *,
    connect_timeout: float = 30.0,
    call_timeout: float = CALL_SECONDS,
    sync: bool = True,
    scratch: str = "",
    caches: str = "",
    layers: str = "",
    launcher: Launcher | None = None,
    document: Mapping[str, Any] | None = None,
    metadata: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Execute a whole build in the image at `root_path`.

    Args:
        block: where the server is, and the credentials for it.
        root_path: directory of the image.
        connect_timeout: seconds to wait for the server at first.
        call_timeout: seconds to wait for the server's answer to a later call.
        sync: have everything on the drives before the success is reported, because the machine may be
            stopped right after.
        scratch: see `Executor`.
        caches: see `Executor`.
        layers: the directory of the image's layers (overlay.py), which are mounted at `root_path` for each
            step; without `lower` in it the image is there already, or its `base`, and what a step has
            changed is found by comparing (comparing.py); empty where nobody wants layers.
        launcher: starts the helpers of RUNs.
        document: the metadata, which a machine that is not there to build is configured by.
        metadata: reads them again.

    Raises:
        GuestError: the build failed; the server has been told where it could be.
    """
    hide_memory()
    set_clock(block.host_time)
    with ExitStack() as stack:
        if layers:
            os.makedirs(root_path, exist_ok=True)
        if not os.path.isdir(root_path):
            raise InputError(f"--root {root_path}: there is no such directory")
        stop = Stop()
        stack.callback(stop.close)
        stack.enter_context(
            heeding_signals(lambda number: stop.set(Interrupted(number, signal.Signals(number).name)))
        )
        stack.enter_context(_last_words())
        client = Client(block, stop, connect_timeout=connect_timeout, call_timeout=call_timeout)
        stack.callback(client.close)
        folders = {"layers": layers, "scratch": scratch, "caches": caches}
        _build(
            client,
            root_path,
            stop,
            block.ping_interval,
            sync=sync,
            launcher=launcher,
            document=document or {},
            metadata=metadata,
            **folders,
        )


@contextmanager
def _last_words() -> Iterator[None]:
    """Say why the build failed while signals are heeded: a host that was told ends its machine at once."""
    try:
        yield
    except GuestError as error:
        complain(error.message)
        error.told = True
        raise


def _build(
    client: Client,
    root_path: str,
    stop: Stop,
    ping_interval: float,
    *,
    sync: bool,
    launcher: Launcher | None,
    document: Mapping[str, Any],
    metadata: Callable[[], Mapping[str, Any]],
    layers: str,
    scratch: str,
    caches: str,
) -> None:
    with _host(client, stop, ping_interval) as host:
        # Only now, so that the first call is made as early as possible.
        from firebuild_bootstrap.layers.root import Root

        from .executor import Executor

        try:
            with Root(root_path) as root:
                kept = _layers(layers, root_path)
                scratch = scratch or layers  # not in the image, which is there only while a step is at work
                Executor(
                    root,
                    host,
                    stop,
                    layers=kept,
                    launcher=launcher,
                    scratch=scratch,
                    caches=caches,
                    configure=lambda: _configured(document, root_path),
                    document=document,
                    metadata=metadata,
                ).execute()
            stop.check()
            if sync:
                os.sync()
            host.success()
        except GuestError as error:
            host.abort(error)
            raise
        except Exception as error:
            wrapped = GuestError(f"vminit failed: {type(error).__name__}: {error}")
            host.abort(wrapped)
            raise wrapped from error


def _configured(document: Mapping[str, Any], root_path: str) -> list[str]:
    """Make the image, which is there for one run only, that of this machine."""
    from .configure import Paths, configure

    paths = Paths() if document.get("Env") else Paths(environment_file="")
    return configure(document, root_path, paths, running=True)


def _layers(directory: str, root_path: str) -> Layers | None:
    """Return what keeps the layers; None where nobody wants any or the file system can hold none."""
    from .overlay import Layers

    if not directory or os.path.isdir(f"{directory}/lower"):
        return Layers(directory, root_path) if directory else None
    from .comparing import Comparing

    with suppress(OSError):
        return Comparing(directory, root_path)
    return None


def _host(client: Client, stop: Stop, ping_interval: float) -> Session | OldServer:
    """Call the server, in the way that it knows."""
    try:
        return join(client, stop, ping_interval)
    except NoSession:
        from firebuild_bootstrap.legacy.old_server import OldServer

        return OldServer(client, stop, ping_interval)


def set_clock(
    host_time: float | None,
    *,
    now: Callable[[], float] = time.time,
    adjust: Callable[[int, float], None] = time.clock_settime,
) -> None:
    """Move a clock that is behind the host's forward; certificates are not valid yet otherwise.

    A machine without a battery-backed clock starts in 1970. Where setting it is not permitted (a sandbox
    shares the host's clock) it is left alone.
    """
    if host_time is None or now() >= host_time - _CLOCK_TOLERANCE:
        return
    try:
        adjust(time.CLOCK_REALTIME, host_time)
    except OSError:
        return


@contextmanager
def heeding_signals(act: Callable[[int], None]) -> Iterator[None]:
    """Have `act` called with each signal that asks for the end, in a thread: handlers may not wait."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {signum: signal.signal(signum, _noted) for signum in _SIGNALS}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(read, act), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(write)
        thread.join()
        os.close(read)


def _noted(_signum: int, _frame: FrameType | None) -> None:
    """Exist, so that the signal is not fatal; the wake-up descriptor carries its number."""


def _watch(descriptor: int, act: Callable[[int], None]) -> None:
    while numbers := os.read(descriptor, 1):
        if numbers[0] in _SIGNALS:
            act(numbers[0])
