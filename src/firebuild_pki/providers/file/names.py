"""Which of the names in a finished certificate is its owner's identity."""

from __future__ import annotations

from cryptography import x509
from cryptography.x509.oid import NameOID

from firebuild_pki.providers.file.certificates import Found

_OTHER_KINDS: dict[type[x509.GeneralName], str] = {
    x509.RFC822Name: "the e-mail address",
    x509.UniformResourceIdentifier: "the URI",
    x509.IPAddress: "the IP address",
}


def client_name(found: Found) -> str:
    """Take the first full DNS name. It is for records only: the guest is known by its fingerprint.

    Raises:
        CAError: there is none.
    """
    return _full_names(found)[0]


def server_name(found: Found, chosen: str | None) -> str:
    """Pick the DNS name that guests check.

    Args:
        found: the server's certificate.
        chosen: the setting ``server_name``.

    Raises:
        CAError: there is none, there are several and none is chosen, or it lacks the chosen one.
    """
    names = _full_names(found)
    if chosen is None:
        if len(names) == 1:
            return names[0]
        hint = f"set server_name to one of them, for example server_name: {names[0]}"
        raise found.source.wrong(f"{found.name} has several DNS names: {', '.join(names)}", hint)
    for name in names:
        if name.lower() == chosen.lower():
            return name
    raise found.source.wrong(
        f"{found.name} has no DNS name {chosen}, which server_name chooses; it has {', '.join(names)}",
        "correct server_name; a name that only a wildcard covers does not count",
    )


def _full_names(found: Found) -> list[str]:
    dns, others = _names_in(found.certificate)
    full = [name for name in dns if "*" not in name]
    if full:
        return full
    shown = " and ".join([*dns, *others]) or "no name at all"
    why = "a wildcard cannot be an identity, " if dns else ""
    raise found.source.wrong(
        f"expected a full DNS name in {found.name}, found {shown}",
        f"{why}have it issued with one, for example subjectAltName=DNS:builds.firebuild.internal",
    )


def _names_in(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    try:
        alternative = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        alternative = []
    dns = [one.value for one in alternative if isinstance(one, x509.DNSName)]
    others = [
        f"{_OTHER_KINDS.get(type(one), 'a name')} {one.value}"
        for one in alternative
        if not isinstance(one, x509.DNSName)
    ]
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return dns, others + [f"the common name {one.value!s}" for one in common]
