"""The messages of a session (protos/rootfs_server.proto), to and from the commands of `wire`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.protobuf.message import DecodeError

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.wire import MAX_ID, WireError

VERSION: Final = 3
"""What a guest says in its Hello; another version has another meaning of the messages."""
_MAX_WINDOW: Final = 0xFFFF  # as in ioctl_tty(2)


# --- commands -------------------------------------------------------------------------------------


def encode(command: wire.AnyCommand) -> pb.ToGuest:
    """Write a command as the host sends it."""
    step = pb.Step(number=command.step, text=command.original, workdir=command.workdir, user=command.user)
    match command:
        case wire.RunCommand():
            run = pb.Run(
                step=step,
                argv=command.argv,
                env=_variables(command.env),
                args=_variables(command.args),
                script=command.script,
                mounts=map(_encode_mount, command.mounts),
                network=command.network,
                attach=None if command.attach is None else _encode_attach(command.attach),
                pauses=command.pauses,
            )
            return pb.ToGuest(run=run)
        case wire.CopyCommand():
            apply = pb.Apply(
                step=step,
                target=command.target,
                target_is_directory=command.target_is_directory,
                chown=command.chown,
                chmod=command.chmod,
                link=command.link,
            )
            return pb.ToGuest(apply=apply)
        case wire.WorkdirCommand():
            return pb.ToGuest(workdir=pb.Workdir(step=step))


def decode(message: pb.ToGuest) -> wire.AnyCommand | None:
    """Read a command; None where the message is another one.

    Raises:
        WireError: it has a value that no command can have.
    """
    match message.WhichOneof("message"):
        case "run":
            run = message.run
            return wire.RunCommand(
                **_step(run.step),
                argv=tuple(run.argv),
                env={variable.name: variable.value for variable in run.env},
                args={variable.name: variable.value for variable in run.args},
                script=run.script if run.HasField("script") else None,
                mounts=tuple(_decode_mount(mount, run.step.workdir) for mount in run.mounts),
                network=_choice("network", run.network, wire.NETWORKS),
                attach=_decode_attach(run.attach) if run.HasField("attach") else None,
                pauses=run.pauses,
            )
        case "apply":
            apply = message.apply
            return wire.CopyCommand(
                **_step(apply.step),
                source="",
                target=_text("target", apply.target),
                target_is_directory=apply.target_is_directory,
                chown=apply.chown if apply.HasField("chown") else None,
                chmod=apply.chmod if apply.HasField("chmod") else None,
                link=apply.link,
            )
        case "workdir":
            return wire.WorkdirCommand(**_step(message.workdir.step))
        case _:
            return None


def window(rows: int, columns: int) -> pb.Window:
    """Return the size of a terminal as it is sent; what the kernel does not take is unknown, 0."""
    return pb.Window(
        **{
            name: number if 0 <= number <= _MAX_WINDOW else 0
            for name, number in (("rows", rows), ("columns", columns))
        }
    )


def window_size(message: pb.Window) -> tuple[int, int]:
    """Return rows and columns.

    Raises:
        WireError: no terminal is that large.
    """
    sizes = (message.rows, message.columns)
    if not all(0 <= each <= _MAX_WINDOW for each in sizes):
        raise WireError(f"a terminal of {sizes[0]} rows and {sizes[1]} columns")
    return sizes


def _encode_attach(attach: wire.Attach) -> pb.Attach:
    return pb.Attach(
        input=attach.input,
        terminal=attach.terminal,
        window=window(attach.rows, attach.columns),
        read_only=attach.read_only,
        init=attach.init,
        identity=None if attach.identity is None else _encode_identity(attach.identity),
        probed=attach.probed,
        volumes=attach.volumes,
    )


def _encode_identity(files: wire.IdentityFiles) -> pb.IdentityFiles:
    return pb.IdentityFiles(names=files.names, owner=files.owner, mode=files.mode, csr=files.csr)


def _decode_identity(files: pb.IdentityFiles) -> wire.IdentityFiles:
    return wire.IdentityFiles(
        names=tuple(files.names),
        owner=_text("owner of the identity", files.owner),
        mode=_number("mode", files.mode, 0o777, of="the identity"),
        csr=files.csr,
    )


def _decode_attach(attach: pb.Attach) -> wire.Attach:
    rows, columns = window_size(attach.window)
    return wire.Attach(
        input=attach.input,
        terminal=attach.terminal,
        rows=rows,
        columns=columns,
        read_only=attach.read_only,
        init=attach.init,
        identity=_decode_identity(attach.identity) if attach.HasField("identity") else None,
        probed=attach.probed,
        volumes=tuple(_text("volume", path) for path in attach.volumes),
    )


def _variables(values: Mapping[str, str]) -> Iterable[pb.Variable]:
    return (pb.Variable(name=name, value=value) for name, value in values.items())


def _step(step: pb.Step) -> dict[str, Any]:
    if step.number < 1:
        raise WireError(f"a step has the number {step.number}")
    return {
        "step": step.number,
        "original": step.text,
        "workdir": _text("workdir", step.workdir),
        "user": _text("user", step.user),
    }


def _encode_mount(mount: wire.Mount) -> pb.Mount:
    match mount:
        case wire.BindMount():
            bind = pb.Mount.Bind(writable=mount.writable)
            return pb.Mount(target=mount.target, resource=mount.resource, bind=bind)
        case wire.CacheMount():
            cache = pb.Mount.Cache(
                id=mount.id, sharing=mount.sharing, read_only=mount.read_only, access=_access(mount)
            )
            return pb.Mount(target=mount.target, resource=mount.resource, cache=cache)
        case wire.TmpfsMount():
            return pb.Mount(target=mount.target, tmpfs=pb.Mount.Tmpfs(size=mount.size))
        case wire.SecretMount():
            secret = pb.Mount.Secret(env=mount.env, access=_access(mount))
            return pb.Mount(target=mount.target, resource=mount.resource, secret=secret)
        case wire.SshMount():
            return pb.Mount(target=mount.target, ssh=pb.Mount.Ssh(id=mount.id, access=_access(mount)))


def _access(mount: wire.CacheMount | wire.SecretMount | wire.SshMount) -> pb.Mount.Access:
    return pb.Mount.Access(mode=mount.mode, uid=mount.uid, gid=mount.gid)


def _decode_mount(mount: pb.Mount, workdir: str) -> wire.Mount:
    """Read one mount; an unknown kind is an error, because the command would run without it."""
    kind = mount.WhichOneof("kind")
    target, resource = _text("target of a mount", mount.target), mount.resource
    if target or kind != "secret":
        wire.mount_target(workdir, target)
    if kind in ("bind", "secret") and not resource:
        raise WireError(f"a {kind} mount without a resource")
    match kind:
        case "bind":
            return wire.BindMount(target=target, resource=resource, writable=mount.bind.writable)
        case "cache":
            cache = mount.cache
            return wire.CacheMount(
                target=target,
                id=_text("id of a mount", cache.id),
                sharing=_choice("sharing", cache.sharing, wire.SHARING),
                resource=resource,
                read_only=cache.read_only,
                **_owned(cache.access),
            )
        case "tmpfs":
            return wire.TmpfsMount(target=target, size=_number("size", mount.tmpfs.size, 2**63 - 1))
        case "secret":
            env = _text("variable of a mount", mount.secret.env)
            if "=" in env or not (env or target):
                raise WireError(f"secret mount: expected the name of a variable, found {env!r:.80}")
            return wire.SecretMount(resource=resource, target=target, env=env, **_owned(mount.secret.access))
        case "ssh":
            return wire.SshMount(target=target, id=mount.ssh.id, **_owned(mount.ssh.access))
        case _:
            raise WireError("a mount of a kind that is not known")


def _owned(access: pb.Mount.Access) -> dict[str, int]:
    return {
        "mode": _number("mode", access.mode, 0o7777),
        "uid": _number("uid", access.uid, MAX_ID),
        "gid": _number("gid", access.gid, MAX_ID),
    }


def _text(what: str, text: str) -> str:
    """Return what a system call will take."""
    if "\0" in text:
        raise WireError(f"{what}: {text!r:.80} contains a NUL")
    return text


def _number(what: str, number: int, most: int, of: str = "a mount") -> int:
    if not 0 <= number <= most:
        raise WireError(f"{what} of {of}: expected a number from 0 to {most}, found {number}")
    return number


def _choice(what: str, word: str, known: tuple[str, ...]) -> str:
    if word not in known:
        raise WireError(f"{what}: expected {', '.join(known)}, found {word!r:.80}")
    return word


# --- files ----------------------------------------------------------------------------------------

# A ToGuest that is a piece, as every protobuf library writes it: its tag and length, the tag and length of
# the data, and the data. Handled here because a library copies each megabyte twice more. It has no checksum:
# TLS authenticates every byte between these two processes, and a CRC would take as long as all of gRPC.
_PIECE_TAG: Final = b"\x3a"
_DATA_TAG: Final = b"\x0a"


def encode_piece(*parts: bytes | bytearray | memoryview) -> bytes:
    """Write the message for a piece of a tar stream, given in parts."""
    size = sum(map(len, parts))
    head = _DATA_TAG + _varint(size)
    return b"".join((_PIECE_TAG, _varint(len(head) + size), head, *parts))


def decode_to_guest(message: bytes) -> pb.ToGuest | memoryview:
    """Read what the host sent; a piece comes as its data.

    Raises:
        WireError: it is not a message.
    """
    if (data := _plain_piece(message)) is not None:
        return data
    try:
        parsed = pb.ToGuest.FromString(message)
    except DecodeError as error:
        raise WireError("it is not a message of a session") from error
    return memoryview(parsed.piece.data) if parsed.HasField("piece") else parsed


def _plain_piece(message: bytes) -> memoryview | None:
    if not message.startswith(_PIECE_TAG):
        return None
    length, begin = _read_varint(message, 1)
    size, start = _read_varint(message, begin + 1)
    data = memoryview(message)[start:]
    is_plain = (
        message[begin : begin + 1] == _DATA_TAG and length == len(message) - begin and size == len(data)
    )
    return data if is_plain else None


def _varint(number: int) -> bytes:
    """Write a number as protobuf does, seven bits to a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at `at`, and where what follows it begins."""
    number = 0
    for shift in range(0, 35, 7):
        byte = data[at] if at < len(data) else 0
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return number, at
