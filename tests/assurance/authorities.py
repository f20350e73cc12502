"""Certificate authorities that go away, seal, or answer wrongly in the midst of builds."""

from __future__ import annotations

import json
import random
import re
import ssl
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml
from cryptography import x509

from assurance.commands import Ended, Place
from assurance.trials import Effort, trial
from baoserver import StoredServer
from components import missing
from e2e.authorities import CFSSL_KEY, STEP_KEY, cfssl_server, step_ca_server
from firebuild_pki import Profile
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.x509 import Validity, fingerprint, make_leaf, to_pem
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
    value = chance.choice(["x", 1, None, "-----BEGIN CERTIFICATE-----\nAAAA\n"])
    data = {"certificate": value}
    ours: dict[str, Any] = {
        "data": chance.choice([data, [], None, {}]),
        "auth": chance.choice([None, {}, 1]),
    }  # of Vault
    names = ("ca", "crt", "certChain", "crts", "provisioners", "nextCursor", "message")  # of step-ca
    shaped = json.dumps(ours | {name: chance.choice([value, [value], [data], {}]) for name in names})
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


def step_ca(cleanup: ExitStack, place: Place, chance: random.Random) -> CA:
    """Start a step-ca that can be killed, behind a proxy that sees its answers, and one that sees TLS."""
    block, issuer, program = cleanup.enter_context(step_ca_server(place.directory))
    root = Path(block.pop("root"))
    key = generate_key()
    validity = Validity.starting(datetime.now(UTC), timedelta(days=1), backdate=timedelta(minutes=5))
    leaf = make_leaf(key.public_key(), issuer, validity, profile=Profile.SERVER, dns_names=["localhost"])
    pair = place.directory / "proxy.pem"
    pair.touch(mode=0o600)
    pair.write_bytes(to_pem([leaf, issuer.certificate]) + private_key_pem(key))
    front = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    front.load_cert_chain(pair)
    behind = ssl.create_default_context(cafile=root)
    behind.check_hostname = False
    behind.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 there may be something to read that is no answer
    inside = cleanup.enter_context(Proxy(program.port, tls=(front, behind)))
    outside = cleanup.enter_context(Proxy(inside.port))
    digest = fingerprint(x509.load_pem_x509_certificate(root.read_bytes()))
    block |= {"address": f"https://localhost:{outside.port}", "root_fingerprint": digest, "timeout": "1s"}
    section = {"provider": "step-ca", "call_timeout": "8s", "revoke_at_end": True, "step-ca": block}
    during: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("kill", program.kill, program.start),
        ("suspend", program.suspend, program.resume),
        ("junk for TLS", lambda: outside.behave(fault(chance)), outside.behave),
    ]
    return CA(section, {"STEP_KEY": STEP_KEY}, inside, during, [json.loads(STEP_KEY)["d"]])


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
    """Build while the CA misbehaves in some way from a random moment on."""
    what, do, undo = effort.chance.choice([("answers", None, None), ("answers", None, None), *ca.during])
    moment = effort.chance.random() * 3 * effort.chance.choice([0, 1])
    if do is None or undo is None:
        behaviour = fault(effort.chance)
        what = behaviour.kind.name.lower()
        do, undo = partial(ca.proxy.behave, behaviour), ca.proxy.behave
    back = None if effort.chance.random() < 0.5 else effort.chance.random() * 4
    in_trouble(effort, place, name, ca, Trouble(what, do, undo, moment, back))


@dataclass(frozen=True)
class Trouble:
    """What happens to a CA in a build.

    Args:
        what: its name.
        do: makes it.
        undo: ends it.
        moment: seconds from the start of the build to its begin.
        back: seconds from there to its end; None for after the build.
    """

    what: str
    do: Callable[[], object]
    undo: Callable[[], object]
    moment: float = 0
    back: float | None = None


def in_trouble(effort: Effort, place: Place, name: str, ca: CA, trouble: Trouble) -> None:
    """Build with a CA in trouble; then build with the CA as it should be."""
    file = place.directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"ca": ca.section}))
    words = ["build", "--no-cache", "--progress", "rawjson", "--config", str(file)]
    words += ["-f", str(place.context / "Dockerfile"), str(place.context)]
    started = place.start(*words, environ=ca.environ)
    with suppress(subprocess.TimeoutExpired):
        started.process.wait(trouble.moment)
    trouble.do()
    if trouble.back is None:
        ended = started.end()
        trouble.undo()
    else:
        with suppress(subprocess.TimeoutExpired):
            started.process.wait(trouble.back)
        trouble.undo()
        ended = started.end()
    effort.counts[f"{name}, {trouble.what}: {judge(ended, ca)}"] += 1
    again = place.start(*words, environ=ca.environ).end().in_words()
    assert again.status == 0, str(again)
    effort.counts[f"{name}, as it should be"] += 1


def place_of(effort: Effort) -> Place:
    """Make the store and the context of the builds."""
    place = Place(effort.directory)
    place.dockerfile("Dockerfile", "RUN sleep 0.5; echo 1 > /one")
    return place


@trial(
    "authorities",
    "builds whose CA is cut off, sealed, killed, slow, or answers with errors and junk at a random moment",
    seconds=300,
    needs=("busybox", "userns", "bao"),
)
def authorities(effort: Effort) -> None:
    """Build with each CA in turn."""
    place = place_of(effort)
    kinds: dict[str, Callable[[ExitStack, Place], CA]] = {"vault": vault, "cfssl": cfssl}
    kinds["step-ca"] = partial(step_ca, chance=effort.chance)
    there = [name for name in kinds if name == "vault" or not missing([name])]
    cas: dict[str, CA] = {}
    with ExitStack() as cleanup:
        while effort.goes_on():
            for name in effort.shuffled(there):
                if name not in cas:
                    cas[name] = kinds[name](cleanup, place)
                effort.attempt(f"{name} in trouble", partial(build, effort, place, name, cas[name]))
