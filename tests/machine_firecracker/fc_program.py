"""An emulated `firecracker`, as a program: its arguments, its API socket, its output and its exit status.

FC_EMULATOR_FAULT makes it fail: die=STATUS (at once), deaf (no socket), mute (no report), late-die=STATUS
(after the start), panic, stuck (its guest neither works nor ends), start (InstanceStart is refused).
FC_EMULATOR_TAPS names tap devices that exist without being real, FC_EMULATOR_LOG a file for all requests.
The emulated jailer sets FC_EMULATOR_ROOT and FC_EMULATOR_OWNER.
"""

from __future__ import annotations

import argparse
import fcntl
import http.server
import os
import signal
import socketserver
import struct
import threading
import time
from pathlib import Path
from typing import Any

from firebuild_bootstrap.guest.init_settings import Report
from machine_firecracker.fc_api import Api, Host, numbers
from machine_firecracker.fc_guest import Guest

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000


class Emulator:
    def __init__(self, api: Api, root: str, fault: str) -> None:
        self.api = api
        self._root = root
        self._fault, _, self._status = fault.partition("=")
        self._taps: list[int] = []
        self.guest: Guest | None = None
        self.answered = threading.Event()
        api.host = Host(self.open_file, self.open_tap, self.start, self.ctrl_alt_del)

    def path(self, path: str) -> Path:
        """Return the host's path of a file that is named as in the jail."""
        return Path(self._root + path if self._root else path)

    def open_file(self, path: str, writable: bool) -> str:
        try:
            os.close(os.open(self.path(path), os.O_RDWR if writable else os.O_RDONLY))
        except OSError as error:
            return str(error)
        if self._root and writable:
            owner = self.path(path).stat()
            if (str(owner.st_uid), str(owner.st_gid)) != tuple(os.environ["FC_EMULATOR_OWNER"].split(":")):
                return f"Permission denied: it belongs to {owner.st_uid}"
        return ""

    def open_tap(self, name: str) -> str:
        if name in os.environ.get("FC_EMULATOR_TAPS", "").split():
            return ""
        if len(name) > 15:
            return "Invalid interface name"
        try:
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
            fcntl.ioctl(tap, _TUNSETIFF, request)
        except OSError as error:
            return str(error)
        self._taps.append(tap)
        return ""

    def start(self) -> str:
        if self._fault == "start":
            return "Internal error while starting microVM: Kvm(Error(13))"
        threading.Thread(target=self.boot, daemon=True).start()
        return ""

    def ctrl_alt_del(self) -> str:
        if self.guest is not None:
            self.guest.press_ctrl_alt_del()
        return ""

    def boot(self) -> None:
        try:
            self._boot()
        except BaseException as error:
            print(f"Kernel panic - not syncing: {error!r}", flush=True)
            os._exit(0)

    def _boot(self) -> None:
        if self._fault == "silent":  # a KVM that opens, and runs nothing
            print("2026-11-27T10:00:00.123456789 [anonymous-instance:main] Running Firecracker", flush=True)
            time.sleep(600)
        print("[    0.000000] Linux version 6.1.0", flush=True)
        self.answered.wait()
        if self._fault == "late-die":
            os._exit(int(self._status))
        if self._fault == "panic":
            raise RuntimeError("VFS: Unable to mount root fs")
        if self._fault == "stuck":
            time.sleep(600)
        snapshot, scratch, *_ = self.api.drives.values()
        assert (snapshot["is_read_only"], scratch["is_read_only"]) == (True, False)
        work = self.path("/guest") if self._root else Path.cwd() / "guest"
        work.mkdir(mode=0o700)
        self.guest = Guest(
            work,
            boot_args=self.api.boot["boot_args"],
            initrd=self.path(self.api.boot["initrd_path"]),
            snapshot=self.path(snapshot["path_on_host"]),
            scratch=self.path(scratch["path_on_host"]),
            store=self.api.store,
            version=self.api.mmds["version"],
            release=numbers(self.api.release),
        )
        report: Report = self.guest.run()
        if self._fault != "mute":
            print(f"\n{report.line()}", flush=True)
        os._exit(0)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    emulator: Emulator

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        status, answer = self.emulator.api.respond(self.command, self.path, body)
        if "FC_EMULATOR_LOG" in os.environ:
            with open(os.environ["FC_EMULATOR_LOG"], "a") as log:
                log.write(f"{status} {self.emulator.api.log[-1]}\n")
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if answer:
            self.wfile.write(answer)
        if self.path == "/actions":
            self.emulator.answered.set()

    do_GET = do_PUT = do_PATCH = _serve  # noqa: N815 - names that the base class looks for

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: standard output is the guest's."""


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self) -> tuple[Any, Any]:
        link, _ = super().get_request()
        return link, ("firecracker", 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="firecracker")
    parser.add_argument("--api-sock", default="/run/firecracker.socket")
    parser.add_argument("--id", default="anonymous-instance")
    parser.add_argument("--level", choices=["Error", "Warning", "Info", "Debug"])
    parser.add_argument("--start-time-us")
    parser.add_argument("--start-time-cpu-us")
    parser.add_argument("--version", action="store_true")
    parsed = parser.parse_args()
    release = os.environ.get("FC_EMULATOR_RELEASE", "1.13.1")
    if parsed.version:
        print(f"Firecracker v{release}\n")
        return
    if parsed.level is not None and numbers(release) < (1, 5):
        print("Arguments parsing error: The argument 'log-path' is required by 'level'", flush=True)
        os._exit(153)
    fault = os.environ.get("FC_EMULATOR_FAULT", "")
    if fault.startswith("die="):
        print("2026-01-01T00:00:00 [anonymous-instance:main] it hurts", flush=True)
        os._exit(int(fault.removeprefix("die=")))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if fault == "deaf":
        time.sleep(600)
    root = os.environ.get("FC_EMULATOR_ROOT", "")
    socket = Path(root + parsed.api_sock)
    if root:
        socket.parent.mkdir(exist_ok=True)
        os.chdir(socket.parent)
        socket = Path(socket.name)
    emulator = Emulator(Api(release=release, machine_id=parsed.id), root, fault)
    handler = type("Bound", (Handler,), {"emulator": emulator})
    with Server(str(socket), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
