"""Certificate authorities that go away, seal, or answer wrongly in the midst of builds."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import yaml

from assurance.commands import Ended, Place
from assurance.trials import Effort, trial
from baoserver import StoredServer
from components import missing
from e2e.authorities import CFSSL_KEY, cfssl_server
from pki_cluster.proxy import Fault, Kind, Proxy
from pki_cluster.scene import Scene

LIMITS: Final = {"timeout": "1s", "retry_for": "3s"}
TOKEN: Final = re.compile(r"\b(?:hvs|hvb|s|b)\.[A-Za-z0-9_-]{20,}")
STATUS: Final = {429: "Too Many Requests", 500: "Internal", 502: "Bad Gateway", 503: "Unavailable", 404: "No"}


def answer(chance: random.Random) -> bytes:
    """Return an answer that no CA gives: errors of proxies, junk, other JSON, too much."""
    status = chance.choice([200, 200, *STATUS])
    junk = chance.choice(
        [b"", b"{", b"<html>", b"null", b"[]", b'"x"', chance.randbytes(500), b"[" * 100_000]
    )
    data = {"certificate": chance.choice(["x", 1, None, "-----BEGIN CERTIFICATE-----\nAAAA\n"])}
    shaped = json.dumps({"data": chance.choice([data, [], None, {}]), "auth": chance.choice([None, {}, 1])})
    large = b'{"data": "' + b"x" * chance.randrange(1 << 24) + b'"}'
    body = chance.choice([junk, shaped.encode(), large])
    length = len(body) + chance.choice([0, 0, 0, 1000, -len(body) // 2])
    head = f"HTTP/1.1 {status} {STATUS.get(status, 'OK')}\r\nContent-Type: application/json\r\n"
    head += chance.choice(["", "Retry-After: 1\r\n", f"Retry-After: {'9' * 30}\r\n"])
    whole = f"{head}Content-Length: {length}\r\n\r\n".encode() + body
    return chance.choice([whole, whole, whole, chance.randbytes(300), b"HTTP/1.1 200 OK\r\n" * 5000])


def fault(chance: random.Random) -> Fault:
    """Return how a proxy behaves for some requests."""
    kinds = [kind for kind in Kind if kind not in (Kind.FORWARD, Kind.REFUSE)]
    return Fault(
        chance.choice([*kinds, *[Kind.ANSWER] * 5]),
        seconds=chance.choice([0.01, 0.5, 2]),
        size=chance.randrange(2000),
        times=chance.choice([1, 1, 2, 3, 1_000_000]),
        answer=answer(chance),
    )


@dataclass
class CA:
    """A CA as a build sees it.

    Args:
        section: the section `ca`.
        environ: its secrets.
        proxy: before it.
        during: something that happens to the server: its name, what, and what undoes it.
        secrets: what must be in no output.
    """

    section: dict[str, Any]
    environ: Mapping[str, str]
    proxy: Proxy
    during: list[tuple[str, Callable[[], object], Callable[[], object]]]
    secrets: list[str]


def vault(cleanup: ExitStack, place: Place) -> CA:
    """Start an OpenBao that can be sealed and killed, behind a proxy."""
    server = cleanup.enter_context(StoredServer(place.directory))
    scene = Scene.made(server.api, "pki")
    proxy = cleanup.enter_context(Proxy(server.port))
    section = scene.section(proxy.address, framework={"revoke_at_end": True}, **LIMITS)

    def suspend() -> None:
        server.process.suspend()  # after a kill it is another process

    def resume() -> None:
        server.process.resume()

    during: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("seal", server.seal, server.unseal),
        ("kill", server.kill, server.start),
        ("suspend", suspend, resume),
    ]
    return CA(section, scene.environ, proxy, during, [scene.login.secret_id, server.root_token])


def cfssl(cleanup: ExitStack, place: Place) -> CA:
    """Start a cfssl behind a proxy."""
    block, _ = cleanup.enter_context(cfssl_server(place.directory))
    proxy = cleanup.enter_context(Proxy(int(block["address"].rpartition(":")[2])))
    section = {"provider": "cfssl", "call_timeout": "5s", "cfssl": {**block, "address": proxy.address}}
    return CA(section, {"CFSSL_KEY": CFSSL_KEY}, proxy, [], [CFSSL_KEY])


def judge(ended: Ended, ca: CA) -> str:
    """See that a build succeeded or said why not, and that no secret is in what it said."""
    said = ended.out + ended.err
    assert not [secret for secret in ca.secrets if secret in said], "a secret is in the output"
    assert TOKEN.search(said) is None, TOKEN.sub("TOKEN", said)
    ended.in_words()
    assert ended.status in (0, 3), str(ended)
    if ended.status:
        return "failed in words"
    if not ca.section.get("revoke_at_end"):
        return "built"
    return "built, and said that it could not revoke" if "revok" in said else "built, and revoked"


def build(effort: Effort, place: Place, name: str, ca: CA) -> None:
    """Build while the CA misbehaves from a random moment on; then build with the CA as it should be."""
    words = [
        "build",
        "--no-cache",
        "--progress",
        "rawjson",
        "--config",
        str(place.directory / f"{name}.yaml"),
    ]
    words += ["-f", str(place.context / "Dockerfile"), str(place.context)]
    what, do, undo = effort.chance.choice([("answers", None, None), ("answers", None, None), *ca.during])
    moment = effort.chance.random() * 3
    if do is None:
        behaviour = fault(effort.chance)
        what = behaviour.kind.name.lower()
        do, undo = partial(ca.proxy.behave, behaviour), ca.proxy.behave
    assert undo is not None
    started = place.start(*words, environ=ca.environ)
    with suppress(subprocess.TimeoutExpired):
        started.process.wait(moment * effort.chance.choice([0, 1]))
    do()
    if effort.chance.random() < 0.5:
        ended = started.end()
        undo()
    else:  # it comes back meanwhile
        with suppress(subprocess.TimeoutExpired):
            started.process.wait(effort.chance.random() * 4)
        undo()
        ended = started.end()
    effort.counts[f"{name}, {what}: {judge(ended, ca)}"] += 1
    again = place.start(*words, environ=ca.environ).end().in_words()
    assert again.status == 0, str(again)
    effort.counts[f"{name}, as it should be"] += 1


@trial(
    "authorities",
    "builds whose CA is cut off, sealed, killed, slow, or answers with errors and junk at a random moment",
    seconds=300,
    needs=("busybox", "userns", "bao"),
)
def authorities(effort: Effort) -> None:
    """Build with each CA in turn."""
    place = Place(effort.directory)
    place.dockerfile("Dockerfile", "RUN sleep 0.5; echo 1 > /one")
    with ExitStack() as cleanup:
        cas = {"vault": vault(cleanup, place)}
        if not missing(["cfssl"]):
            cas["cfssl"] = cfssl(cleanup, place)
        for name, ca in cas.items():
            file = place.directory / f"{name}.yaml"
            file.write_text(yaml.safe_dump({"ca": ca.section}))
        while effort.goes_on():
            for name, ca in cas.items():
                if effort.goes_on():
                    effort.attempt(f"{name} in trouble", partial(build, effort, place, name, ca))
