"""A host that nobody else is on: a network namespace with addresses of all kinds and a server on all of them.

Runs as a program: `reach KIND ADDRESS…` says which of the addresses a program at a machine's place reaches;
`build ARGUMENT…` runs firebuild.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading

PORT, ECHO_PORT = 8080, 8081
ADDRESSES = ("203.0.113.1", "198.51.100.7", "169.254.169.254", "169.254.1.1")
_ASK = """
import json, socket, sys
found = {}
for address in sys.argv[2:]:
    with socket.socket(type=socket.SOCK_STREAM if sys.argv[1] == "tcp" else socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        try:
            client.connect((address, %d))
            client.send(b"hello")
            found[address] = client.recv(100) == b"the host"
        except OSError:
            found[address] = False
print(json.dumps(found))
"""


def run(*arguments: str) -> str:
    """Run this program on such a host and return what it writes."""
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def serve() -> None:
    """Answer everybody, on every address."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in ADDRESSES:
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    stream, echo = (socket.create_server(("", port)) for port in (PORT, ECHO_PORT))
    datagram = socket.socket(type=socket.SOCK_DGRAM)
    datagram.bind(("", PORT))
    threading.Thread(target=_serve_streams, args=(stream,), daemon=True).start()
    threading.Thread(target=_serve_echoes, args=(echo,), daemon=True).start()
    threading.Thread(target=_serve_datagrams, args=(datagram,), daemon=True).start()


def _serve_streams(server: socket.socket) -> None:
    while True:
        client, _ = server.accept()
        with client:
            client.sendall(b"the host")


def _serve_echoes(server: socket.socket) -> None:
    while True:
        client, _ = server.accept()
        with client:
            while data := client.recv(65536):
                client.sendall(data)


def _serve_datagrams(server: socket.socket) -> None:
    while True:
        _, client = server.recvfrom(100)
        server.sendto(b"the host", client)


def reach(kind: str, *addresses: str) -> str:
    """Say which of the addresses a program at the place of a machine's QEMU reaches."""
    from firebuild_bootstrap.machine.qemu.command import find_program
    from firebuild_bootstrap.machine.qemu.namespace import HandedFile, MachineNamespace
    from firebuild_bootstrap.machine.qemu.uplink import Uplink
    from firebuild_bootstrap.machine.usernet import TUN
    from firebuild_bootstrap.sandbox import Sandbox, detect, find_runtime

    sandbox, runtime = Sandbox(detect()), find_runtime()
    namespace = MachineNamespace(sandbox, runtime, tun=HandedFile(TUN, writable=True))
    assert namespace.uplink is not None
    uplink = Uplink(sandbox, runtime, find_program(), namespace.uplink)
    try:
        namespace.run(["/usr/bin/python3", "-c", _ASK % PORT, kind, *addresses])
        assert namespace.process.wait(120) == 0
        uplink.check()
        return namespace.output.read().decode()
    finally:
        uplink.close()
        namespace.close()


def build(*arguments: str) -> str:
    """Run firebuild and return what it says."""
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=140, check=False)
    return json.dumps([done.returncode, done.stdout, done.stderr])


if __name__ == "__main__":
    serve()
    print(reach(*sys.argv[2:]) if sys.argv[1] == "reach" else build(*sys.argv[2:]))
