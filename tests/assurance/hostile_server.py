"""Servers that have the right certificate, or nearly, and bad intentions, and our guest in its sandbox."""

from __future__ import annotations

import itertools
import queue
import random
import re
import socket
import ssl
import stat
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc

from assurance.trials import Effort, damaged, trial
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.legacy.scripts import encode_command
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.sandbox import Bind, IdMap, Runtime, detect, find_runtime
from guest.build import Build, copy_command, make_image, run_command
from guest.pki import SERVER_NAME, Authority, Pki
from guest.server import END, BuildServer, chunk, group, head, member, piece
from support import eventually, family, highest_peak

PATIENCE: Final = 90.0
"""Seconds of a guest, on a machine with other work; its own limits are less than 30."""
LIMITS: Final = ("--connect-timeout", "5", "--call-timeout", "3")
MEMORY: Final = 300 << 20
"""Bytes that each process of a guest takes at most."""
AT_ONCE: Final = 3
PLAY: Final = 5.0
"""Seconds of what has no end."""
MOST: Final = 64 << 20
"""Bytes of files without end: they are written to a disk."""
WORDS: Final = 10_000
"""Characters of what a guest says of its end."""
OUTSIDE: Final = "/outside"
NAMES: Final = (
    *("f", "d/f", "../f", "../../outside/f", "/outside/f", "d/../../outside/f", "l/f", "l", "h", "..", "."),
    *("", "./", "f\0g", "f\n\x1b[2J", "x" * 300, "d/" * 3000, "etc/passwd", "proc/1/root/f", "\udcff"),
)
_OTHERS: Final = (
    "root",
    "0:0",
    "99999999999",
    "1000:x",
    "u+x",
    "7777777",
    "\u00fc\u202e",
    "-1",
    "x" * 100_000,
)
TEXTS: Final = (*NAMES, *_OTHERS)
NUMBERS: Final = (-(2**31), -1, 0, 1, 2, 3, 64, 255, 2**31 - 1)
ARGV: Final[tuple[list[str], ...]] = (
    ["/bin/true"],
    ["/bin/sh", "-c", "echo x; sleep 0.2"],
    ["/bin/sh", "-c", "sleep 1000 & exit 3"],
    ["/nowhere"],
    [],
    ["\0"],
    ["x" * 200_000],
    ["/bin/sh"] * 1000,
)
KINDS: Final = (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"Z")  # fmt: skip


def text(chance: random.Random) -> str:
    """Some text that a message can hold."""
    return chance.choice(TEXTS).encode("utf-8", "replace").decode()


def data(chance: random.Random) -> bytes:
    """Some bytes."""
    return chance.choice(
        (b"", b"x", b"\x1b[2J\xff", chance.randbytes(chance.randrange(1, 70_000)), END.piece.data)
    )


def an_entry(chance: random.Random) -> bytes:
    """An entry of an archive that no host of ours sends."""
    one = tarfile.TarInfo(chance.choice(NAMES))
    one.type = chance.choice(KINDS)
    one.linkname = chance.choice((*NAMES, OUTSIDE, f"{OUTSIDE}/kept", "../" * 30 + "outside"))
    one.mode, one.uid, one.gid = chance.choice((0o644, 0o7777, 0)), chance.choice((0, 1, 2**31)), 0
    one.mtime = chance.choice((0, -1, 2**62, 0.5))
    one.size = chance.choice((0, 0, 5, 513, 2**40, 2**62))
    one.devmajor, one.devminor = 1, 3
    if chance.random() < 0.2:
        name = chance.choice(("path", "linkpath", "size", "SCHILY.xattr.user.x", "GNU.sparse.map"))
        one.pax_headers = {name: chance.choice(("../f", "9" * 400, "-1", "0,5,9,9", "x" * 10_000))}
    try:
        whole = one.tobuf(
            tarfile.PAX_FORMAT if chance.random() < 0.8 else tarfile.GNU_FORMAT, "utf-8", "surrogateescape"
        )
    except ValueError:  # there is no such number in this form
        return member("f", b"x")
    content = chance.randbytes(min(one.size, 1024))
    return whole + content + bytes(-len(content) % 512)


def a_step(chance: random.Random, number: int | None = None) -> pb.Step:
    """What every step has, mostly as it should be."""
    wrong = chance.random() < 0.2
    return pb.Step(
        number=chance.choice(NUMBERS) if number is None else number,
        text="RUN x",
        workdir=text(chance) if wrong else "/",
        user=text(chance) if wrong and chance.random() < 0.5 else "0:0",
    )


def a_mount(chance: random.Random) -> pb.Mount:
    """A mount of any kind on anything."""
    access = pb.Mount.Access(mode=chance.choice((0o400, -1, 2**20)), uid=chance.choice((0, -1, 2**40)))
    kinds: tuple[dict[str, Any], ...] = (
        {"bind": pb.Mount.Bind(writable=True)},
        {
            "cache": pb.Mount.Cache(
                id=text(chance), sharing=chance.choice(("shared", "locked", "x")), access=access
            )
        },
        {"tmpfs": pb.Mount.Tmpfs(size=chance.choice((0, -1, 2**62)))},
        {"secret": pb.Mount.Secret(env=chance.choice(("", "A", "A=B")), access=access)},
        {"ssh": pb.Mount.Ssh(id=text(chance), access=access)},
        {},
    )
    target = chance.choice(("/m", "/../outside", "/proc", "/dev", "/", "l/m", text(chance)))
    return pb.Mount(target=target, resource=chance.choice(("r", "", text(chance))), **chance.choice(kinds))


def a_run(chance: random.Random, number: int | None = None, *, attached: bool = False) -> pb.ToGuest:
    """A command that writes nothing anywhere, with anything around it."""
    files = pb.IdentityFiles(names=[text(chance)], owner=text(chance), mode=chance.choice(NUMBERS), csr=True)
    attach = pb.Attach(
        input=chance.random() < 0.5,
        terminal=chance.random() < 0.5,
        window=pb.Window(rows=chance.choice(NUMBERS)) if chance.random() < 0.2 else None,
        read_only=chance.random() < 0.2,
        identity=files if chance.random() < 0.3 else None,
        probed=chance.random() < 0.5,
    )
    wrong = chance.random() < 0.3
    run = pb.Run(
        step=a_step(chance, number),
        argv=chance.choice(ARGV) if wrong else ARGV[1],
        env=[pb.Variable(name=text(chance), value=text(chance))] if wrong else [],
        network=chance.choice(("default", "none", "host", text(chance))) if wrong else "default",
        mounts=[a_mount(chance) for _ in range(chance.choice((0, 0, 1, 3)))] if wrong else [],
        attach=attach if attached else None,
        pauses=chance.random() < 0.1,
    )
    return pb.ToGuest(run=run)


def an_apply(chance: random.Random, number: int | None = None, target: str | None = None) -> pb.ToGuest:
    """A COPY."""
    wrong = chance.random() < 0.2
    apply = pb.Apply(
        step=a_step(chance, number),
        target=chance.choice(("/t/", "/", "../../outside/", "/l/", text(chance)))
        if target is None
        else target,
        target_is_directory=chance.random() < 0.8,
        chown=text(chance) if wrong else None,
        chmod=text(chance) if wrong else None,
        link=chance.random() < 0.1,
    )
    return pb.ToGuest(apply=apply)


def to_the_command(chance: random.Random) -> pb.ToGuest:
    """Something that is said to a command at work."""
    return chance.choice(
        (
            pb.ToGuest(input=pb.Input(data=data(chance), last=chance.random() < 0.1)),
            # none that ends the command, which what comes next is for
            pb.ToGuest(signal=pb.Signal(number=chance.choice((-1, 0, 1, 18, 23, 28, 65, 2**31 - 1)))),
            pb.ToGuest(window=pb.Window(rows=chance.choice(NUMBERS), columns=chance.choice(NUMBERS))),
            pb.ToGuest(
                identity=pb.Identity(number=chance.choice(NUMBERS), chain=text(chance), trust=text(chance))
            ),
            pb.ToGuest(probe=pb.Probe(argv=chance.choice(ARGV))),
            pb.ToGuest(agent_reply=pb.AgentReply(number=chance.choice((0, 1, 2)), message=data(chance))),
        )
    )


def a_message(chance: random.Random) -> pb.ToGuest:
    """Anything that a host can say."""
    return chance.choice(
        (
            a_run(chance, attached=chance.random() < 0.3),
            an_apply(chance),
            pb.ToGuest(workdir=pb.Workdir(step=a_step(chance))),
            pb.ToGuest(checkpoint=pb.Checkpoint(step=chance.choice(NUMBERS))),
            group(from_directory=chance.random() < 0.5, keep_owner=chance.random() < 0.5),
            piece(an_entry(chance)),
            piece(data(chance)),
            pb.ToGuest(files_end=pb.FilesEnd()),
            pb.ToGuest(finish=pb.Finish()),
            pb.ToGuest(),
            to_the_command(chance),
        )
    )


class Enemy(BuildServer):
    """A server whose sessions go as an attack says.

    Args:
        pki: its certificate, and the CA of guests.
        attack: says what is sent.
        chance: decides.
        credentials: instead of those of `pki`.
    """

    def __init__(
        self,
        pki: Pki,
        attack: Attack,
        chance: random.Random,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        super().__init__(pki, credentials=credentials)
        self._attack = attack
        self.chance = chance
        self.heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Kinds of what the guest has said, but for signs of life and output; `gone` at its end."""
        self.listens = True

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if self.old:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")
        if self.listens:
            threading.Thread(target=self._listen, args=(requests,), daemon=True).start()
        for message in self._attack(self):
            if not context.is_active():
                return
            yield message if isinstance(message, bytes) else message.SerializeToString()
        match self.chance.choice(("end", "silence", "abort", "finish")):
            case "silence":
                self.is_silent(context)
            case "abort":
                code = self.chance.choice(list(grpc.StatusCode)[1:])
                context.abort(code, text(self.chance)[:2000].encode("ascii", "replace").decode())
            case "finish":
                yield pb.ToGuest(finish=pb.Finish()).SerializeToString()
                self.is_silent(context)

    def is_silent(self, context: grpc.ServicerContext) -> None:
        """Say nothing until the guest has gone."""
        eventually(lambda: not context.is_active(), PATIENCE)

    def _listen(self, requests: Iterator[bytes]) -> None:
        with suppress(grpc.RpcError):
            for one in requests:
                what = pb.FromGuest.FromString(one).WhichOneof("message") or ""
                if what not in ("alive", "output"):
                    self.heard.put(what)
        self.heard.put("gone")

    def hear(self, what: str) -> bool:
        """Wait until the guest says something; False where it has gone, or says nothing for a while."""
        with suppress(queue.Empty):
            while (heard := self.heard.get(timeout=PLAY)) != "gone":
                if heard == what:
                    return True
        return False

    # --- the calls of old -------------------------------------------------------------------------

    def _commands(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.CommandsResponse:
        if self.chance.random() < 0.1:
            self.is_silent(context)
        some = [copy for copy in OLD_COMMANDS if self.chance.random() < 0.5]
        some += [text(self.chance)] if self.chance.random() < 0.3 else []
        return pb.CommandsResponse(command=some or [OLD_COMMANDS[0]])

    def _resource(self, request: pb.ResourceRequest, context: grpc.ServicerContext) -> Iterator[Any]:
        chance, end = self.chance, time.monotonic() + PLAY
        for _ in range(chance.choice((1, 10, 3000))):
            if time.monotonic() > end or not context.is_active():
                return
            name = chance.choice(NAMES).encode("utf-8", "replace").decode()
            yield chance.choice(
                (
                    head(
                        name,
                        targetPath=text(chance),
                        targetWorkdir=text(chance),
                        targetUser=text(chance),
                        fileMode=chance.choice(NUMBERS),
                    ),
                    head(name, isDir=True, fileMode=chance.choice((0o7777, 2**31))),
                    chunk(data(chance), name),
                    chunk(b"abc", name, checksum=b"x"),
                    pb.ResourceChunk(eof=pb.ResourceChunk.ResourceEof(id=name)),
                    pb.ResourceChunk(),
                )
            )


OLD_COMMANDS: Final = (
    *(
        encode_command(command)
        for command in (
            copy_command("/t/"),
            copy_command("../../outside/", source="../../f"),
            copy_command("/l/", source="l"),
            run_command("echo x"),
            copy_command("f", workdir="/../outside"),
        )
    ),
    "[" * 5000,
    "{}",
    "null",
)
Attack = Callable[[Enemy], Iterator[pb.ToGuest | bytes]]


def while_it_plays(messages: Iterator[pb.ToGuest]) -> Iterator[pb.ToGuest]:
    """Yield messages for a while."""
    end = time.monotonic() + PLAY
    return itertools.takewhile(lambda _: time.monotonic() < end, messages)


def messages_by_chance(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    for _ in range(enemy.chance.randint(1, 40)):
        yield a_message(enemy.chance)


def damaged_messages(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    yield an_apply(enemy.chance, 2, "/t/")
    for _ in range(enemy.chance.randint(1, 20)):
        yield damaged(enemy.chance, a_message(enemy.chance).SerializeToString())


def nothing(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    yield from ()


def huge_messages(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    yield an_apply(enemy.chance, 2, "/t/")
    yield group(from_directory=True)
    yield piece(bytes(enemy.chance.randrange(3 << 20, 40 << 20)))


def entries_by_chance(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    yield an_apply(enemy.chance, 2)
    yield group(from_directory=enemy.chance.random() < 0.7, of_tree=enemy.chance.random() < 0.3)
    for _ in range(enemy.chance.choice((1, 3, 30))):
        yield piece(an_entry(enemy.chance))
    yield END
    yield pb.ToGuest(files_end=pb.FilesEnd())
    enemy.hear("done")


def ways_out(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    """Files behind links that come before them; the archive is a good one otherwise."""
    up = enemy.chance.choice((OUTSIDE, "../" * 30 + OUTSIDE[1:], f"{OUTSIDE}/kept", "/proc/1/root/outside"))
    link = enemy.chance.choice((tarfile.SYMTYPE, tarfile.LNKTYPE))
    first = tarfile.TarInfo(enemy.chance.choice(("l", "d/l")))
    first.type, first.linkname = link, up
    second = tarfile.TarInfo(enemy.chance.choice((first.name, f"{first.name}/f", f"{first.name}/../f")))
    second.size = 4
    yield an_apply(enemy.chance, 2, enemy.chance.choice(("/t/", "/", "/l/", "../../outside/")))
    yield group(from_directory=True)
    yield piece(first.tobuf() + second.tobuf() + b"evil" + bytes(508))
    yield END
    yield pb.ToGuest(files_end=pb.FilesEnd())
    if enemy.hear("done"):  # the link is there now
        yield an_apply(enemy.chance, 3, f"/{first.name}/")
        yield group(from_directory=True)
        yield piece(member("f", b"evil"))
        yield END
        yield pb.ToGuest(files_end=pb.FilesEnd())
        enemy.hear("done")


def a_file_without_end(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    one = tarfile.TarInfo("f")
    one.size = enemy.chance.choice((2**40, 2**33, 5))
    yield an_apply(enemy.chance, 2, "/t/")
    yield group(from_directory=enemy.chance.random() < 0.5)
    yield piece(one.tobuf(tarfile.GNU_FORMAT))
    content = enemy.chance.randbytes(1 << 20)
    yield from while_it_plays(itertools.repeat(piece(content), MOST >> 20))


def files_without_end(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    yield an_apply(enemy.chance, 2, "/t/")
    yield group(from_directory=True)
    some = (b"".join(member(f"{n}/{k}", b"x") for k in range(100)) for n in range(300))
    yield from while_it_plays(piece(each) for each in some)


def groups_without_end(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    yield an_apply(enemy.chance, 2, "/t/")
    yield from while_it_plays(itertools.repeat(enemy.chance.choice((group(), piece(b""), piece(b"x")))))


def steps_without_end(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    yield from while_it_plays(
        pb.ToGuest(workdir=pb.Workdir(step=pb.Step(number=n, text="WORKDIR", workdir=f"/w{n}", user="0:0")))
        for n in range(2, 100_000)
    )


def words_to_a_command(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    run = a_run(enemy.chance, 2, attached=True)
    del run.run.argv[:]
    run.run.argv.extend(["/bin/sh", "-c", "sleep 1; cat"])
    yield run
    enemy.hear("begun")
    for _ in range(enemy.chance.choice((1, 10, 300))):
        yield to_the_command(enemy.chance)


def words_to_nobody(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    yield from (to_the_command(enemy.chance) for _ in range(5))


def input_without_end(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    step = pb.Step(number=2, text="RUN x", workdir="/", user="0:0")
    attach = pb.Attach(input=True, terminal=enemy.chance.random() < 0.5)
    yield pb.ToGuest(run=pb.Run(step=step, argv=["/bin/sleep", "1000"], network="default", attach=attach))
    yield from while_it_plays(itertools.repeat(pb.ToGuest(input=pb.Input(data=bytes(1 << 20))), 500))


def an_ear_that_is_shut(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    """Have a command write without end, and read nothing of it."""
    step = pb.Step(number=2, text="RUN x", workdir="/", user="0:0")
    endless = "while :; do echo 0123456789012345678901234567890123456789; done"
    yield pb.ToGuest(run=pb.Run(step=step, argv=["/bin/sh", "-c", endless], network="default"))
    time.sleep(PLAY)


def layers_wanted(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    for number in enemy.chance.choices(NUMBERS, k=4):
        yield pb.ToGuest(checkpoint=pb.Checkpoint(step=number))
        enemy.hear("layer")


def two_at_once(enemy: Enemy) -> Iterator[pb.ToGuest | bytes]:
    """Begin a step while another is at work."""
    yield a_run(enemy.chance, 2)
    for number in (2, 3, 3):
        yield enemy.chance.choice((a_run(enemy.chance, number), an_apply(enemy.chance, number)))


SESSION: Final[dict[str, Attack]] = {
    "messages by chance": messages_by_chance,
    "damaged messages": damaged_messages,
    "sessions of nothing": nothing,
    "huge messages": huge_messages,
    "entries by chance": entries_by_chance,
    "ways out": ways_out,
    "files without end": files_without_end,
    "a file without end": a_file_without_end,
    "groups without end": groups_without_end,
    "steps without end": steps_without_end,
    "words to a command": words_to_a_command,
    "words to nobody": words_to_nobody,
    "input without end": input_without_end,
    "output that nobody reads": an_ear_that_is_shut,
    "layers wanted": layers_wanted,
    "two steps at once": two_at_once,
}
OLD: Final = "calls of old"


# --- who is not even the server ------------------------------------------------------------------------


AUTHORITY: Final = Authority("test authority")
PKI: Final = Pki(
    ca=AUTHORITY.pem,
    server=AUTHORITY.issue(SERVER_NAME, server=True),
    guest=AUTHORITY.issue(f"guest.{SERVER_NAME}", server=False),
    stranger=Authority("a stranger"),
)
CERTIFICATES: Final = {
    "a certificate of another CA": PKI.stranger.issue(SERVER_NAME, server=True),
    "a certificate of a CA of the same name": Authority("test authority").issue(SERVER_NAME, server=True),
    "a certificate of another name": AUTHORITY.issue("b-2.firebuild.internal", server=True),
    "a certificate of a name that ends alike": AUTHORITY.issue(f"x.{SERVER_NAME}", server=True),
    "a certificate of a guest": AUTHORITY.issue(SERVER_NAME, server=False),
}
ANOTHER: Final = "another certificate on the next connection"


def changing() -> grpc.ServerCredentials:
    """Show another certificate on each connection; all are of the right CA, and have the right name."""

    def another() -> Any:
        pair = AUTHORITY.issue(SERVER_NAME, server=True)
        return grpc.ssl_server_certificate_configuration([(pair.key, pair.cert)], PKI.ca)

    return grpc.dynamic_ssl_server_credentials(another(), another, require_client_authentication=True)


SOCKETS: Final = (
    *("silence", "an end at once", "garbage", "half a record", "TLS and silence", "TLS and an end"),
    *("TLS and garbage", "TLS and settings without end", "TLS and tokens"),
)


@contextmanager
def socket_of(kind: str, chance: random.Random, directory: Path) -> Iterator[str]:
    """Listen, and be no gRPC server; yields the address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = directory / "pair.pem"
    pair.write_bytes(PKI.server.key + PKI.server.cert)
    context.load_cert_chain(pair)
    context.set_alpn_protocols(["h2"])
    over = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.settimeout(5)
        with suppress(OSError), ExitStack() as closing:
            closing.callback(connection.close)
            if kind.startswith("TLS"):
                connection = closing.enter_context(context.wrap_socket(connection, server_side=True))
            match kind.removeprefix("TLS and "):
                case "silence":
                    over.wait(PATIENCE)
                case "garbage":
                    connection.sendall(chance.randbytes(100_000))
                case "half a record":
                    connection.sendall(b"\x16\x03\x03\x40\x00" + bytes(100))
                    over.wait(PATIENCE)
                case "settings without end":
                    for _ in while_it_plays(itertools.repeat(pb.ToGuest())):
                        connection.sendall(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)) * 1000)
                case "tokens":
                    connection.sendall(b"\0" * 9 + b"a" * 64 * chance.choice((1, 2, 10_000)))
                    over.wait(1)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(16) as pool:
        listener.settimeout(0.1)

        def accept() -> None:
            while not over.is_set():
                with suppress(TimeoutError):
                    pool.submit(serve, listener.accept()[0])

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            acceptor.join()


# --- the guest ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """What all guests run on."""

    directory: Path
    runtime: Runtime
    idmap: IdMap

    def try_out(self, server: Enemy, address: str, chance: random.Random) -> str:
        """Run a guest against a server, and judge it; return how it ended, in a word."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        directory.chmod(0o755)
        outside = directory / "outside"
        outside.mkdir()
        (outside / "kept").write_text("kept")
        before = listing(outside)
        image = make_image(directory / "image")
        build = Build(PKI, server, image, directory, self.runtime, self.idmap, outside)
        build.ping_interval = 0.5
        build.block_changes = {"HostPort": address}
        build.extra_binds = [Bind(outside, OUTSIDE, read_only=False)]
        build.arguments = [*LIMITS]
        if chance.random() < 0.5:
            layers = directory / "layers"
            for name in ("lower/0", "lower/1"):
                (layers / name).mkdir(parents=True)
            build.extra_binds += [Bind(layers, "/layers", read_only=False), Bind(image, "/layers/lower/1")]
            build.arguments += ["--layers", "/layers"]
        with build.start() as running:
            pid, most, end = running.sandbox.process.pid, 0, time.monotonic() + PATIENCE
            family_of = {pid}
            while (status := running.sandbox.wait(0.02)) is None:
                assert time.monotonic() < end, f"the guest did not end in {PATIENCE} seconds"
                family_of |= family(family_of)
                most = max(most, highest_peak(family_of))
            assert eventually(lambda: not highest_peak(family_of)), "a process is left"
            assert running.sandbox.stderr is not None
            said = running.sandbox.stderr.read().decode(errors="backslashreplace")
        judge(status, said)
        assert most < MEMORY, f"{most} bytes of memory"
        assert listing(outside) == before, listing(outside)
        remove_tree(directory, ignore_errors=True)
        return str(status)


def listing(directory: Path) -> list[tuple[str, int, bytes]]:
    """Return what is in a directory: names, modes, contents."""
    found = []
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        found.append((path.name, mode, path.read_bytes() if stat.S_ISREG(mode) else b""))
    return found


def judge(status: int, said: str) -> None:
    """See that a guest ended well, or in words."""
    about = f"status {status}: {said[-3000:]}"
    assert "Traceback" not in said, about
    assert status in (0, 1, 2, 4), about
    assert status == 0 or re.search(r"^vminit: .", said, re.MULTILINE), about
    assert all(one.isprintable() or one in "\n\t" for one in said), repr(about)
    assert len(said) < WORDS, about


@trial(
    "hostile-servers",
    "servers that say what they must not, or are not the right one, and the guest program in its sandbox",
    seconds=300,
    needs=("bwrap", "busybox"),
)
def servers(effort: Effort) -> None:
    """One guest after the other against servers of all kinds."""
    ground = Ground(effort.directory, find_runtime(), detect())

    def session(attack: Attack, chance: random.Random, pki: Pki = PKI, **more: Any) -> str:
        server = Enemy(pki, attack, chance, **more)
        server.old = attack is old
        server.listens = attack is not an_ear_that_is_shut
        server.start()
        try:
            return ground.try_out(server, server.host_port, chance)
        finally:
            server.stop()

    def old(_: Enemy) -> Iterator[pb.ToGuest | bytes]:
        yield from ()

    def refused(work: Callable[[], str]) -> None:
        status = work()
        assert status == "4", f"the guest ended with status {status}"

    def attempt(kind: str, seed: int) -> None:
        chance = random.Random(seed)
        if kind in SESSION:
            session(SESSION[kind], chance)
        elif kind == OLD:
            session(old, chance)
        elif kind in CERTIFICATES:
            refused(lambda: session(messages_by_chance, chance, replace(PKI, server=CERTIFICATES[kind])))
        elif kind == ANOTHER:
            refused(lambda: session(messages_by_chance, chance, credentials=changing()))
        else:
            with socket_of(kind, chance, Path(tempfile.mkdtemp(dir=effort.directory))) as address:
                server = Enemy(PKI, nothing, chance)
                try:
                    refused(lambda: ground.try_out(server, address, chance))
                finally:
                    server.stop()

    kinds = [*SESSION, OLD, *CERTIFICATES, ANOTHER, *SOCKETS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while effort.goes_on():
            some = effort.chance.sample(kinds, len(kinds) if effort.seconds > 30 else AT_ONCE)
            begun = {kind: pool.submit(attempt, kind, effort.chance.getrandbits(64)) for kind in some}
            for kind, done in begun.items():
                effort.attempt(kind, done.result)
