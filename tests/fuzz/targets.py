"""What reads bytes that somebody else wrote, each as a function that a fuzzer can call.

A target takes any bytes. It may raise what its `Target` names, which is how the product says that input is
wrong; any other exception is a fault, and so is an input that takes more than `SECONDS` of a processor. One
that waits is found by libFuzzer's -timeout.
"""

from __future__ import annotations

import hashlib
import io
import json
import socket
import tempfile
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf.message import DecodeError

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.cli.run import read_env
from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
from firebuild_bootstrap.dockerfile.operations import read_git, redacted
from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.guest.errors import StepError
from firebuild_bootstrap.guest.metadata import BadAnswer, TooLong, exchange
from firebuild_bootstrap.guest.users import Users
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.layouts import FilesInArchive, images_in
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import Descriptor, Manifest, parse_config, parse_manifest
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4
from firebuild_bootstrap.image.worker.extfs import Ext4Image
from firebuild_bootstrap.image.worker.imagewalk import image_entries
from firebuild_bootstrap.layers.reader import LayerReader, Limits
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tar import FILE, Entry, LayerError, write_layer
from firebuild_bootstrap.layers.tree import tree_entries
from firebuild_bootstrap.machine.firecracker.api import FirecrackerApi
from firebuild_bootstrap.machine.firecracker.cni import link_of
from firebuild_bootstrap.machine.firecracker.settings import NetworkSettings
from firebuild_bootstrap.matching import BadPattern, IgnorePattern, Pattern
from firebuild_bootstrap.mmds.protocol import BadRequest, MetadataService, parse_request
from firebuild_bootstrap.mmds.store import DataStore
from firebuild_bootstrap.registry.answers import error_words, origin_of, read_challenges, shown_url
from firebuild_bootstrap.registry.credentials import find_credentials
from firebuild_bootstrap.registry.settings import RegistrySettings
from firebuild_bootstrap.settings import BuildSettings
from firebuild_bootstrap.solve.remote import read_records
from firebuild_bootstrap.sshagent import KeyAgent
from firebuild_bootstrap.terminal import SafeStream
from firebuild_pki import CAError, order_chain, validate
from firebuild_pki.addresses import joined
from firebuild_pki.documents import parse_document
from firebuild_pki.issuing import checked_csr
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.names import Names
from firebuild_pki.preflighting.inspection import inspect_files, read_bytes
from firebuild_pki.provider import Profile
from firebuild_pki.x509 import Validity, make_csr, make_intermediate, make_leaf, make_root, to_pem
from fuzz import sessions, written
from fuzz.choices import Choices

SECONDS: Final = 10.0
"""More than any input of a fuzzer needs, on a machine with other work."""


@dataclass(frozen=True)
class Target:
    """Something to be fuzzed.

    Args:
        run: takes an input.
        raises: what it may raise.
        seeds: inputs to begin with, which show what the format looks like.
    """

    run: Callable[[bytes], object]
    raises: tuple[type[BaseException], ...]
    seeds: tuple[bytes, ...]


class _Bases:
    def resolve(self, reference: str) -> ImageConfig:
        if reference == "missing":
            raise InputError("there is no such image", hint="import it")
        return ImageConfig()


def _dockerfile(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    read_graph(DockerfileSource("Dockerfile", text), images=_Bases(), platform="linux/amd64")


def _patterns(data: bytes) -> None:
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for line in lines[1:50]:
        IgnorePattern.parse(line)
        Pattern.path(line).matches(lines[0])
        Pattern.shell(line).matches(lines[0])


def _layer(data: bytes) -> None:
    """Read an archive, and write what was read: that has to be readable, too."""
    for whiteouts in (False, True):
        limits = Limits(entries=1000, content=1 << 22)
        for entry in LayerReader(io.BytesIO(data), limits, whiteouts=whiteouts):
            assert not entry.path.startswith("/")
            assert ".." not in entry.path.split("/")


def _manifest(data: bytes) -> None:
    parse_manifest(data)


def _image_config(data: bytes) -> None:
    parse_config(data)


def _references(data: bytes) -> None:
    found = Reference.parse(data.decode("utf-8", "surrogateescape"))
    assert Reference.parse(str(found)) == found


def _settings(data: bytes) -> None:
    document = parse_document(data.decode("utf-8", "surrogateescape"))
    validate(BuildSettings, document)


def _certificates(data: bytes) -> None:
    inspect_files([read_bytes("input", data)], now=datetime.now(UTC))


def _chain(data: bytes) -> None:
    leaf, _, others = data.partition(b"-----END CERTIFICATE-----")
    order_chain(leaf + b"-----END CERTIFICATE-----", others)


def _request(data: bytes) -> None:
    checked_csr(data, Names.of("guest.example.test"))


def _metadata_service(data: bytes) -> None:
    store = DataStore()
    store.put({"latest": {"meta-data": {"a": "text", "b": {"c": "1"}, "d": 1}}})
    service = MetadataService(store, clock=time.monotonic)
    rest = data
    while found := parse_request(rest):
        request, taken = found
        service.respond(request).encode(keep_alive=True)
        rest = rest[taken:]


def _metadata_answer(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        theirs.sendall(data[:100_000])
        theirs.shutdown(socket.SHUT_WR)
        exchange(ours, "mmds", "GET", "/latest", {}, limit=1000)


def _to_guest(data: bytes) -> None:
    message = messages.decode_to_guest(data)
    if not isinstance(message, memoryview) and (command := messages.decode(message)) is not None:
        assert messages.decode(messages.encode(command)) == command


def _from_guest(data: bytes) -> None:
    pb.FromGuest.FromString(data)


def _registry(data: bytes) -> None:
    text = data.decode("latin-1")
    error_words(data)
    read_challenges([text])
    target = joined("https://registry.example/v2/", text)
    origin_of(target)
    assert shown_url(target).isprintable()


def _document(data: bytes, form: object) -> bytes:
    """Return a document of JSON: that which the bytes are, or else `form` damaged as they say."""
    if data[:1] in (b"{", b"["):
        return data
    return json.dumps(Choices(data).damaged(form)).encode()


def _layout(data: bytes) -> None:
    """Read an archive of `docker save` or an OCI layout, whose documents are damaged."""
    choices = Choices(data)
    config, layer = json.dumps(choices.damaged(_CONFIG)).encode(), b"layer"
    manifest = json.dumps(choices.damaged(_manifest_of(config, layer))).encode()
    index = {"schemaVersion": 2, "manifests": [_described(manifest, _MANIFEST["mediaType"])]}
    docker = [{"Config": "config.json", "RepoTags": ["a:1"], "Layers": ["layer.tar"]}]
    files = {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps(choices.damaged(index)).encode(),
        **{f"blobs/sha256/{hashlib.sha256(one).hexdigest()}": one for one in (config, manifest, layer)},
    }
    if choices.below(2):
        files = {"manifest.json": json.dumps(choices.damaged(docker)).encode()}
        files |= {"config.json": config, "layer.tar": layer}
    with tempfile.TemporaryDirectory() as directory, Path(directory, "archive").open("w+b") as archive:
        entries = ((Entry(name, FILE, 0o644, size=len(one)), one) for name, one in files.items())
        write_layer(archive, entries)
        archive.flush()
        for image in images_in(FilesInArchive(archive, "archive"), Platform("linux", "amd64")):
            assert image


def _described(data: bytes, kind: object) -> dict[str, object]:
    return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}


def _manifest_of(config: bytes, layer: bytes) -> dict[str, object]:
    kind = "application/vnd.oci.image.layer.v1.tar"
    about = _described(config, "application/vnd.oci.image.config.v1+json")
    return {**_MANIFEST, "config": about, "layers": [_described(layer, kind)]}


def _remote_cache(data: bytes) -> None:
    blob = "sha256:" + "0" * 64
    layer = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", blob, 2)
    config = Descriptor("application/vnd.firebuild.cache.v1+json", blob, 2)
    read_records(Manifest.made_of(config, (layer,)), _document(data, _RECORDS), "a cache")


def _git_source(data: bytes) -> None:
    for text in data.decode("utf-8", "surrogateescape").split("\n")[:20]:
        if (tree := read_git(text)) is not None:
            assert ".." not in tree.subdirectory.split("/")
            redacted(tree.url)


def _logins(data: bytes) -> None:
    """Read a file of logins, and what a program for credentials answers."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "config.json")
        path.write_bytes(_document(data, _LOGINS))
        environ = {"REGISTRY_AUTH_FILE": str(path), "HOME": directory, "PATH": directory}
        find_credentials("registry.example", "a/b", RegistrySettings(), environ)


def _cni_result(data: bytes) -> None:
    result = None
    with suppress(ValueError, RecursionError):  # a plugin that writes no JSON has failed
        result = json.loads(_document(data, _CNI))
    if isinstance(result, dict):
        link_of(result, NetworkSettings(cni="net"), "/run/netns/x", "x")


def _firecracker_answer(data: bytes) -> None:
    """Have Firecracker's API answer anything to a GET, on a socket."""
    with tempfile.TemporaryDirectory() as directory, closing(socket.socket(socket.AF_UNIX)) as listener:
        path = Path(directory, "s")
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            client, _ = listener.accept()
            with closing(client), suppress(OSError):
                client.sendall(data[:60_000])
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            FirecrackerApi(path, timeout=5).get("/")
        finally:
            thread.join()


def _users(data: bytes) -> None:
    """Look users up in the passwd and group files of an image."""
    passwd, _, group = data.partition(b"\0")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "etc").mkdir()
        Path(directory, "etc/passwd").write_bytes(passwd)
        Path(directory, "etc/group").write_bytes(group)
        with Root(directory) as root:
            for user in ("", "a", "0", "a:b", "1000"):
                with suppress(StepError):
                    found = Users(root).identity(user)
                    assert all(0 <= one < 2**32 - 1 for one in (found.uid, *found.groups))


def _agent_request(data: bytes) -> None:
    """Ask an agent with one key; a list, a signature or a failure comes back."""
    public, agent = _agent()
    over = threading.Event()
    request = data if data[:1] != b"\r" else b"\r" + len(public).to_bytes(4) + public + data[1:]
    assert agent.answer(request, over)[0] in (5, 12, 14)


@cache
def _agent() -> tuple[bytes, KeyAgent]:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    public = b64decode(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])
    return public, KeyAgent({public: key})


def _terminal(data: bytes) -> None:
    """Whatever a guest writes, no control character but SGR sequences, tabs and line ends comes out."""
    stream = SafeStream(colours=False)
    shown = stream.feed(data[: len(data) // 2]) + stream.feed(data[len(data) // 2 :], final=True)
    assert all(one.isprintable() or one in "\n\r\t" or one.isspace() for one in shown), shown
    assert "\x1b" not in shown


def _env_file(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        read_env([Path(file.name)], [], {})


def _ext4(data: bytes) -> None:
    """Write some bytes into a file system, and read all of it as a layer; what is unreadable is named.

    The input is records of eight bytes: where in the metadata, and four bytes to be there.
    """
    content = bytearray(_small_ext4())
    for at in range(0, len(data) - 7, 8):
        where = int.from_bytes(data[at : at + 4], "little") % len(content)
        content[where : where + 4] = data[at + 4 : at + 8]
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with closing(Ext4Image(file.name)) as image:
            write_layer(io.BytesIO(), image_entries(image))


@cache
def _small_ext4() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        tree, path = Path(directory, "tree"), Path(directory, "image")
        (tree / "d").mkdir(parents=True)
        (tree / "d/file").write_bytes(b"x" * 5000)
        (tree / "long").symlink_to("l" * 100)
        (tree / "short").symlink_to("d/file")
        make_ext4(tree_entries(str(tree)), str(path), Ext4Options(size=1 << 20, inodes=16, journal=False))
        return path.read_bytes()


def _pem_seeds() -> tuple[bytes, bytes]:
    validity = Validity.starting(datetime.now(UTC), timedelta(days=3650), backdate=timedelta())
    root = make_root(generate_key(), validity, with_intermediate=True)
    issuer = make_intermediate(generate_key(), root, validity)
    key = generate_key()
    names = ["guest.example.test"]
    leaf = make_leaf(key.public_key(), issuer, validity, profile=Profile.GUEST, dns_names=names)
    return to_pem([leaf, issuer.certificate, root.certificate]) + private_key_pem(key), make_csr(key, names)


def _layer_seed() -> bytes:
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/l", tarfile.SYMTYPE), ("d/.wh.x", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../x" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member)
        member = tarfile.TarInfo("d/" + "long" * 40)
        member.size, member.mtime = 3, 1.5
        member.pax_headers = {"SCHILY.xattr.user.a": "b", "GNU.sparse.major": "1"}
        tar.addfile(member, io.BytesIO(b"abc"))
    return file.getvalue()


def _to_guest_seeds() -> tuple[bytes, ...]:
    mounts = (wire.CacheMount(target="/c", id="c"), wire.TmpfsMount(target="/t", size=1))
    run = wire.RunCommand(
        step=1, original="RUN x", workdir="/", user="0", argv=("/bin/sh",), env={"A": "1"}, mounts=mounts
    )
    return (messages.encode(run).SerializeToString(), messages.encode_piece(b"abc"))


_DOCKERFILE: Final = rb"""# syntax=docker/dockerfile:1
# escape=`
ARG V=1
FROM --platform=linux/amd64 base:${V} AS build
SHELL ["/bin/bash", "-c"]
ENV A=1 B="two words" C=${A:-x}${B%%w*}
RUN --mount=type=cache,target=/c,sharing=locked --network=none `
    echo $A && <<EOT
text
EOT
COPY --chown=1:2 --chmod=u+x --from=build a* [b] /d/
COPY <<"F" <<-G /e/
	one $A
F
	two
	G
ADD --checksum=sha256:00 https://example.test/x /y
HEALTHCHECK --interval=5s CMD ["true"]
EXPOSE 80/tcp 1-3
LABEL a=b "c d"=e
ONBUILD RUN true
FROM scratch
VOLUME ["/v"]
USER 1000:a
WORKDIR ../x
STOPSIGNAL SIGTERM
ENTRYPOINT ["a"]
CMD b
"""
_MANIFEST: Final = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "config": {
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": "sha256:" + "0" * 64,
        "size": 2,
    },
    "layers": [],
}
_CONFIG: Final = {
    "architecture": "amd64",
    "os": "linux",
    "config": {
        "Env": ["A=1"],
        "Cmd": ["x"],
        "ExposedPorts": {"80/tcp": {}},
        "Healthcheck": {"Test": ["NONE"]},
    },
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]},
    "history": [{"created_by": "RUN x", "empty_layer": True}],
}
_SETTINGS: Final = (
    b"ca: {provider: vault, vault: {address: 'https://v', auth: {method: token}}}\n"
    b"machine: {driver: qemu, qemu: {memory: 2GiB}}\nbootstrap:\n  ping_interval: 1h30m\n  a: &b [*b]\n"
)


_RECORDS: Final = {
    "records": [
        {
            "id": "0" * 16 + "-" + "0" * 16,
            "key": "0" * 64,
            "parent": "",
            "sources": [["0" * 64, "0" * 16 + "-" + "0" * 16]],
            "text": "RUN x",
            "created": 1,
            "diff_id": "sha256:" + "0" * 64,
            "blob": "sha256:" + "0" * 64,
        }
    ]
}
_LOGINS: Final = {
    "auths": {
        "https://registry.example/v1/": {"auth": "YTpi", "identitytoken": "t"},
        "registry.example/a": {"registrytoken": "r"},
    },
    "credHelpers": {"other.example": "none"},
}
_CNI: Final = {
    "cniVersion": "1.0.0",
    "interfaces": [
        {"name": "tap0", "sandbox": "/run/netns/x", "mac": "02:00:00:00:00:01"},
        {"name": "tap0", "sandbox": "x", "mac": "02:00:00:00:00:02"},
    ],
    "ips": [{"address": "10.0.0.2/24", "gateway": "10.0.0.1"}],
    "dns": {"nameservers": ["10.0.0.1"]},
}


def _targets() -> dict[str, Target]:
    certificates, request = _pem_seeds()
    return {
        "dockerfile": Target(_dockerfile, (InputError,), (_DOCKERFILE,)),
        "patterns": Target(_patterns, (BadPattern,), (b"a/b/c.txt\n**/*.txt\n!a/**\n[a-c]*\\?\n",)),
        "layer": Target(_layer, (LayerError,), (_layer_seed(),)),
        "manifest": Target(_manifest, (InputError,), (json.dumps(_MANIFEST).encode(),)),
        "image-config": Target(_image_config, (InputError,), (json.dumps(_CONFIG).encode(),)),
        "references": Target(
            _references, (InputError,), (b"localhost:5000/a/b:1@sha256:" + b"0" * 64, b"A.example/x")
        ),
        "settings": Target(_settings, (CAError,), (_SETTINGS,)),
        "certificates": Target(_certificates, (CAError,), (certificates, request)),
        "chain": Target(_chain, (CAError,), (certificates,)),
        "request": Target(_request, (CAError,), (request,)),
        "metadata-service": Target(
            _metadata_service,
            (BadRequest,),
            (
                b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n"
                b"GET /latest/meta-data/b HTTP/1.1\r\nAccept: application/json\r\n\r\n",
            ),
        ),
        "metadata-answer": Target(
            _metadata_answer, (BadAnswer, TooLong), (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",)
        ),
        "to-guest": Target(_to_guest, (wire.WireError,), _to_guest_seeds()),
        "from-guest": Target(_from_guest, (DecodeError,), (b"\x0a\x02\x08\x03",)),
        "registry": Target(
            _registry,
            (),
            (b'Bearer realm="https://a/t",service="x", Basic realm=y', b'{"errors": [{"code": "X"}]}'),
        ),
        "terminal": Target(_terminal, (), (b"\x1b[31mred\x1b[0m\r\n\xe6\x97\xa5\x1b]0;t\x07\t\xff",)),
        "env-file": Target(_env_file, (InputError,), (b"\xef\xbb\xbfA=1\n# c\nB\n C = d\r\n",)),
        "layout": Target(_layout, (InputError, LayerError), (b"", b"\0\0\1", bytes(40) + b"\1")),
        "remote-cache": Target(_remote_cache, (InputError,), (b"\0", json.dumps(_RECORDS).encode())),
        "git-source": Target(
            _git_source,
            (ValueError,),
            (b"git@host:a/b.git#v1:d\nhttps://u:p@h/a.git?ref=x&subdir=d&checksum=abcd&submodules=false",),
        ),
        "logins": Target(_logins, (InputError,), (b"\0", json.dumps(_LOGINS).encode())),
        "cni-result": Target(_cni_result, (MachineError,), (b"\0", json.dumps(_CNI).encode())),
        "firecracker-answer": Target(
            _firecracker_answer,
            (MachineError,),
            (
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
                b'HTTP/1.1 400 No\r\n\r\n{"fault_message": 1}',
            ),
        ),
        "users": Target(_users, (StepError,), (b"a:x:1000:1000:A:/home/a:/bin/sh\0b:x:1000:a,c\n",)),
        "agent-request": Target(_agent_request, (), (b"\x0b", b"\r\0\0\0\3abc\0\0\0\2")),
        "hostile-guest": Target(sessions.hostile_guest, (), (b"", bytes(80))),
        "hostile-server": Target(sessions.hostile_server, (), (b"\4\0" * 4, bytes(40))),
        "ext4-written": Target(written.ext4_written, (), (bytes(range(1, 120)),)),
        "layers-applied": Target(written.layers_applied, (), (bytes(range(1, 120)),)),
        "packages": Target(
            written.package_databases,
            (),
            (
                b"\0Package: a\nStatus: install ok installed\nVersion: 1\n",
                b"\1P:a\nV:1\nL:MIT\n\n",
                b"\2" + bytes(range(90)),
                b"\3" + bytes(range(90)),
                b"\4Name: a\nVersion: 1\n",
                b'\5{"name": "a", "version": "1", "license": {"type": "MIT"}}',
                b"\6ID=debian\n",
            ),
        ),
        "ext4": Target(_ext4, (LayerError,), (bytes([0, 4, 0, 0, 9, 0, 0, 0]),)),
    }


TARGETS: Final = _targets()


def check(name: str, data: bytes) -> None:
    """Give a target one input.

    Raises:
        AssertionError: the target takes too long.
    """
    target = TARGETS[name]
    began = time.process_time()
    with suppress(*target.raises):
        target.run(data)
    took = time.process_time() - began
    assert took < SECONDS, f"{name}: {took:.1f} s for {len(data)} bytes"
