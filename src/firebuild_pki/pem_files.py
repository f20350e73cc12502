"""Files that the settings name, each read once, and the PEM blocks in them."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import field
from shlex import quote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from firebuild_pki import homes
from firebuild_pki.display import counted
from firebuild_pki.errors import CAError
from firebuild_pki.values import dataclass

MAX_SIZE = 1024 * 1024
"""More bytes than any bundle of certificates has; protects from a wrong path."""


CERTIFICATE_LABELS = frozenset({"CERTIFICATE", "X509 CERTIFICATE"})
KEY_LABELS = frozenset({"PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"})

_BEGIN = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----")

_PKCS7 = bytes.fromhex("06092a864886f70d010702")
_PKCS12 = bytes.fromhex("02010330")


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and the setting that names it.

    Args:
        setting: name of the setting, below the provider's block; empty for a file that an argument names.
        path: as written there.
    """

    setting: str
    path: str

    @property
    def real_path(self) -> str:
        """The path with ``~`` expanded."""
        return os.path.expanduser(self.path)

    @property
    def quoted(self) -> str:
        """The path for a shell command in a hint."""
        return quote(self.real_path)

    def wrong(self, message: str, hint: str | None = None) -> CAError:
        """Word an error about this file; for the caller to raise."""
        return CAError(f"{self}: {message}", hint=hint)

    def __str__(self) -> str:
        return f"{self.setting} {self.real_path}".lstrip()


@dataclass(frozen=True, slots=True)
class Content:
    """What was in a file, and who could read it then.

    Args:
        source: the file.
        data: its bytes, without a byte order mark.
        mode: its permission bits.
        owner: user id of its owner.
    """

    source: Source
    data: bytes = field(repr=False)
    mode: int
    owner: int

    def must_be_private(self) -> None:
        """Refuse a private key that others can use.

        Raises:
            CAError: they can; with the command that changes it.
        """
        whom = open_to(self.mode, self.owner, os.geteuid())
        if whom is None:
            return
        hint = f"chmod {self.mode & stat.S_IRWXU:o} {self.source.quoted}"
        real = os.path.realpath(self.source.real_path)
        if any(part.startswith("..") for part in real.split(os.sep)):  # how the kubelet lays secrets out
            hint = "set defaultMode: 0400 for the volume of this secret in the pod's specification"
        raise self.source.wrong(f"the private key in it can be used {whom} (mode {self.mode:04o})", hint)


def expanded(path: str) -> str:
    """Expand ``~`` in the path of what may be made there: in a directory called ``~`` it would not be found.

    Raises:
        CAError: nobody's home directory is known for it.
    """
    found = homes.expanded(path)
    if found is None:
        whose = path.partition("/")[0]
        raise CAError(f"{path}: no home directory is known for {whose}", hint="write the path out")
    return found


def read(source: Source) -> Content:
    """Read a file, following links.

    Raises:
        CAError: it cannot be read, is not a file, is empty, or too large.
    """
    try:
        # non-blocking: opening a FIFO would wait for a writer
        descriptor = os.open(source.real_path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error
    try:
        status = os.fstat(descriptor)
        _must_be_file(source, status)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_SIZE + 1).removeprefix(codecs.BOM_UTF8)
    finally:
        os.close(descriptor)
    if not data.strip():
        raise source.wrong("the file is empty")
    if len(data) > MAX_SIZE:  # it has grown, or is one of /proc, whose size is 0
        raise _too_large(source, f"more than {MAX_SIZE} bytes")
    return Content(source, data, stat.S_IMODE(status.st_mode), status.st_uid)


def open_to(mode: int, owner: int, user: int) -> str | None:
    """Tell who besides a user can use a file.

    A file of root may be readable for a group: that is how a key is handed to a service that does
    not run as root (``ssl-cert`` of Debian, ``fsGroup`` of Kubernetes).

    Args:
        mode: permission bits.
        owner: user id of the owner of the file.
        user: effective user id of this process.

    Returns:
        Text for a message, or None if no other user can.
    """
    tolerated = stat.S_IRGRP if owner == 0 and user != 0 else 0
    if mode & stat.S_IRWXO:
        return "by every user of this machine"
    if mode & stat.S_IRWXG & ~tolerated:
        return "by its group"
    return None


def _must_be_file(source: Source, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise source.wrong("expected a file, found a directory", "name the file inside it")
    if not stat.S_ISREG(status.st_mode):
        hint = "write what comes out of it into a file of its own"
        raise source.wrong("expected a regular file, found a pipe, a device or a socket", hint)
    if status.st_size > MAX_SIZE:
        raise _too_large(source, counted(status.st_size, "byte"))


def _too_large(source: Source, found: str) -> CAError:
    return source.wrong(
        f"expected certificates or a key, found {found}; no such file is larger than {MAX_SIZE}"
    )


def _unreadable(source: Source, error: OSError | ValueError) -> CAError:
    path = source.real_path
    if isinstance(error, ValueError):
        return source.wrong("the path cannot be that of a file")
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return source.wrong(f"the link leads to {os.path.realpath(path)}, which does not exist")
        relative = f"relative paths start at {os.getcwd()}" if not os.path.isabs(path) else None
        return source.wrong("there is no such file", relative)
    if isinstance(error, PermissionError):
        hint = "let this user read the file and enter the directories above it"
        return source.wrong(f"the user id {os.geteuid()} may not read it", hint)
    return source.wrong(f"cannot be read: {error.strerror}")


@dataclass(frozen=True, slots=True)
class Block:
    """One PEM block.

    Args:
        label: what it says it is.
        pem: the whole of it; may be a private key.
    """

    label: str
    pem: bytes

    def __repr__(self) -> str:
        return f"Block({self.label!r})"


@dataclass(frozen=True, slots=True)
class Foreign:
    """Something that is not what was expected.

    Args:
        name: what it is, with its article.
        remedy: what to do; ``{file}`` stands for its path, quoted for a shell.
    """

    name: str
    remedy: str | None = None


def blocks_in(source: Source, data: bytes, wanted: frozenset[str], expected: str) -> list[Block]:
    """Find the PEM blocks of one kind; text and blocks of another kind around them are left out.

    Args:
        source: where the data is from.
        data: the content of the file.
        wanted: labels to look for.
        expected: what to call that in messages, with its article.

    Returns:
        At least one block.

    Raises:
        CAError: there is none; the message names what is there instead.
    """
    found = blocks_of(data)
    matching = [block for block in found if block.label in wanted]
    if not found or is_cut_off(data, found):
        foreign = named(data)
    elif any(b"\\n" in block.pem for block in matching or found):
        foreign = ESCAPED
    elif matching:
        return matching
    else:
        foreign = labelled(found[0].label)
    raise _instead(source, expected, foreign)


def blocks_of(data: bytes) -> list[Block]:
    """Find all PEM blocks, up to the first one without its END line."""
    found, position = [], 0
    while begin := _BEGIN.search(data, position):  # one expression for BEGIN and END is quadratic
        end = b"-----END %b-----" % begin[1]
        position = data.find(end, begin.end()) + len(end)
        if position < len(end):
            break
        found.append(Block(begin[1].decode(), data[begin.start() : position]))
    return found


def is_cut_off(data: bytes, found: Sequence[Block]) -> bool:
    """Tell whether there is a BEGIN line without its END behind the blocks that `blocks_of` found."""
    return len(found) < len(_BEGIN.findall(data))


def labelled(label: str) -> Foreign:
    """Say what a PEM block with this label is."""
    return _LABELS.get(label, Foreign(f'a PEM block called "{label}"'))


def _instead(source: Source, expected: str, found: Foreign) -> CAError:
    remedy = found.remedy and found.remedy.replace("{file}", source.quoted)
    return source.wrong(f"expected {expected} in PEM, found {found.name}", remedy)


def reencrypt_hint(source: Source) -> str:
    """Name the command for a private key whose encryption is not known here."""
    return f"encrypt it again: openssl pkcs8 -topk8 -v2 aes-256-cbc -in {source.quoted} -out new.key"


_SWAPPED_KEY = "has this file been swapped with that of the certificate?"
_SWAPPED_CERTIFICATE = "has this file been swapped with that of the key?"
_REQUEST = Foreign(
    "a certificate signing request (CSR)", "name the certificate that the CA made from this request"
)

ESCAPED = Foreign(
    r'a PEM block whose ends of lines are written as "\n", as in JSON',
    'write them as such: printf %b "$(cat {file})" > file.pem',
)

CUT_OFF = Foreign("a PEM block without its END line", "the file was cut off: copy it again")

_LABELS = {
    **dict.fromkeys(KEY_LABELS, Foreign("a private key", _SWAPPED_KEY)),
    **dict.fromkeys(CERTIFICATE_LABELS, Foreign("a certificate", _SWAPPED_CERTIFICATE)),
    "TRUSTED CERTIFICATE": Foreign(
        "a certificate in OpenSSL's own TRUSTED form", "convert it: openssl x509 -in {file} -out file.pem"
    ),
    "CERTIFICATE REQUEST": _REQUEST,
    "NEW CERTIFICATE REQUEST": _REQUEST,
    "X509 CRL": Foreign("a certificate revocation list (CRL)"),
    "PUBLIC KEY": Foreign("a public key"),
    "EC PARAMETERS": Foreign("the parameters of an elliptic curve, and no key"),
    "DSA PRIVATE KEY": Foreign("a DSA key", "use an RSA or EC key"),
    "OPENSSH PRIVATE KEY": Foreign(
        "a key in OpenSSH's own form", "convert a copy: ssh-keygen -p -m PKCS8 -f {file}"
    ),
    "PKCS7": Foreign(
        "a PKCS#7 bundle", "convert it: openssl pkcs7 -in {file} -print_certs -out certificates.pem"
    ),
}


def named(data: bytes) -> Foreign:
    """Say what a file is that holds no complete PEM block, by its first bytes."""
    if _BEGIN.search(data):
        return CUT_OFF
    for start, foreign in _BEGINNINGS.items():
        if data.lstrip().startswith(start):
            return foreign
    if data.startswith(b"\x30"):
        return _der(data)
    if b"\0" in data:
        return Foreign("binary data")
    return Foreign("text without any BEGIN line")


_BEGINNINGS = {
    b"\xff\xfe": Foreign("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {file} > file.pem"),
    b"\xfe\xff": Foreign("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {file} > file.pem"),
    b"LS0tLS1CRUdJTi": Foreign(
        "a PEM file in base64, as in a Kubernetes secret", "decode it: base64 -d {file} > file.pem"
    ),
    b"MII": Foreign(
        "base64 without BEGIN and END lines", "decode it to DER first: base64 -d {file} > file.der"
    ),
    b"\xfe\xed\xfe\xed": Foreign(
        "a Java keystore",
        "convert it: keytool -importkeystore -srckeystore {file} -destkeystore file.p12 "
        "-deststoretype PKCS12, then openssl pkcs12 -in file.p12",
    ),
}


def _der(data: bytes) -> Foreign:
    if _PKCS12 in data[:12]:
        return Foreign(
            "a PKCS#12 file",
            "take it apart: openssl pkcs12 -in {file} -nokeys -out certificates.pem, "
            "and openssl pkcs12 -in {file} -nocerts -out private.key",
        )
    if _PKCS7 in data[:20]:
        return Foreign(
            "a PKCS#7 bundle in DER",
            "convert it: openssl pkcs7 -inform DER -in {file} -print_certs -out certificates.pem",
        )
    for load, foreign in _DER_LOADERS:
        try:
            load(data)
        except (ValueError, UnsupportedAlgorithm):
            continue
        except TypeError:  # an encrypted key, without its passphrase
            pass
        return foreign
    return Foreign("binary data")


_DER_LOADERS: tuple[tuple[Callable[[bytes], object], Foreign], ...] = (
    (
        x509.load_der_x509_certificate,
        Foreign("a DER certificate", "convert it: openssl x509 -inform DER -in {file} -out file.pem"),
    ),
    (x509.load_der_x509_csr, _REQUEST),
    (
        lambda data: serialization.load_der_private_key(data, None),
        Foreign("a DER private key", "convert it: openssl pkey -inform DER -in {file} -out file.pem"),
    ),
)
