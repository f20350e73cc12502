"""A server that answers as AWS Private CA and STS do: moto's, in a process of its own, made stricter here.

What is moto's: the HTTP server, the JSON and query protocols with their errors, the CAs and their life
(CreateCertificateAuthority, GetCertificateAuthorityCsr, ImportCertificateAuthorityCertificate,
GetCertificateAuthorityCertificate, DescribeCertificateAuthority, UpdateCertificateAuthority), the store of
certificates, and STS (AssumeRole, GetCallerIdentity).

What is ours, as moto 5.2 has none of it, after the API reference and the user guide of AWS Private CA:

- the key of a CA is of the kind that KeyAlgorithm says (moto's are all RSA 2048), and UsageMode is kept;
- IssueCertificate as a whole: templates with their key usages and extensions, API passthrough,
  SigningAlgorithm, Validity, ValidityNotBefore, IdempotencyToken, the state of the CA, seven days in
  short-lived mode, no end after that of the CA, MalformedCSRException (moto: two templates with both usages,
  365 days, SHA-512, else a certificate without usages, or a crash);
- GetCertificate: RequestInProgressException for the first questions, the chain up to the root (moto: the CA's
  own certificate), ResourceNotFoundException (moto: a crash);
- RevokeCertificate: unknown serial numbers, and those revoked already (moto takes all);
- in front of moto: signatures (version 4) and session tokens are checked, permissions by action and template,
  an external id, and faults that a test asks for.

Which code AWS has for an argument that does not fit is not documented for each of them: here it is
InvalidArgsException. Requests of boto3 for these operations, and no others, are answered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import ssl
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from moto.acmpca.models import CertificateAuthority
from moto.acmpca.responses import ACMPCAResponse
from moto.core.exceptions import JsonRESTError
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from moto.sts.models import sts_backends
from werkzeug.serving import make_server

ACCOUNT = "123456789012"
ADMIN = ("AKIAADMIN00000000000", "of-whoever-sets-the-cas-up-and-nobody-else")
BUILDS = ("AKIABUILDS0000000000", "wJalrXUtnFEMI-of-the-builds-secret-access-key")
TEMPORARY = (
    "ASIATEMPORARY0000000",
    "of-temporary-credentials-the-secret-key",
    "the-session-token-of-temporary-ones",
)

_KEYS: dict[str, Callable[[], Any]] = {
    "RSA_2048": lambda: rsa.generate_private_key(65537, 2048),
    "EC_prime256v1": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EC_secp384r1": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ML_DSA_65": mldsa.MLDSA65PrivateKey.generate,
}
_USAGES: dict[str, tuple[x509.ObjectIdentifier, ...] | None] = {
    "EndEntityCertificate": (Usage.SERVER_AUTH, Usage.CLIENT_AUTH),
    "EndEntityServerAuthCertificate": (Usage.SERVER_AUTH,),
    "EndEntityClientAuthCertificate": (Usage.CLIENT_AUTH,),
    "BlankEndEntityCertificate": None,
    "RootCACertificate": (),
    "SubordinateCACertificate_PathLen0": (),
}
_NAMED = {"SERVER_AUTH": Usage.SERVER_AUTH, "CLIENT_AUTH": Usage.CLIENT_AUTH}
_HASHES: dict[str, Any] = {
    "SHA256": hashes.SHA256(),
    "SHA384": hashes.SHA384(),
    "SHA512": hashes.SHA512(),
}


@dataclass
class Behaviour:
    """What a test may ask for; the defaults are an obedient AWS.

    Args:
        in_progress: how many GetCertificate for each certificate come too early.
        throttled: how many requests to come are throttled.
        denied: IAM actions that are not allowed.
        templates: ARNs that a policy's Condition allows; None for all.
        external_id: what AssumeRole has to bring along.
        errors: error codes by operation, instead of an answer.
        expired: whether session tokens have expired.
        silent: whether nothing is answered, until the next behaviour.
    """

    in_progress: int = 0
    throttled: int = 0
    denied: list[str] = field(default_factory=list)
    templates: list[str] | None = None
    external_id: str | None = None
    errors: dict[str, str] = field(default_factory=dict)
    expired: bool = False
    silent: bool = False


@dataclass
class _State:
    behaviour: Behaviour = field(default_factory=Behaviour)
    calls: list[list[Any]] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    changed: threading.Event = field(default_factory=threading.Event)


_state = _State()


def refuse(code: str, message: str) -> JsonRESTError:
    return JsonRESTError(code, message)


# --- AWS Private CA --------------------------------------------------------------------------------


class Responses(ACMPCAResponse):
    """The operations that moto answers too simply."""

    def create_certificate_authority(self) -> str:
        answer: str = super().create_certificate_authority()
        parameters = json.loads(self.body)
        ca = self._ca(json.loads(answer)["CertificateAuthorityArn"])
        key = _KEYS[parameters["CertificateAuthorityConfiguration"]["KeyAlgorithm"]]()
        encryption = serialization.NoEncryption()
        ca.password = None  # type: ignore[assignment]
        ca.private_bytes = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
        ca.usage_mode = parameters.get("UsageMode", "GENERAL_PURPOSE")
        return answer

    def get_certificate_authority_csr(self) -> str:
        ca = self._ca(json.loads(self.body)["CertificateAuthorityArn"])
        key: Any = ca.key
        algorithm = None if isinstance(key, mldsa.MLDSA65PrivateKey) else hashes.SHA256()
        csr = x509.CertificateSigningRequestBuilder().subject_name(ca.issuer).sign(key, algorithm)
        return json.dumps({"Csr": csr.public_bytes(serialization.Encoding.PEM).decode()})

    def issue_certificate(self) -> str:
        parameters = json.loads(self.body)
        ca = self._ca(parameters["CertificateAuthorityArn"])
        token = parameters.get("IdempotencyToken")
        if token not in _state.tokens:
            arn = f"{ca.arn}/certificate/{hashlib.sha256(self.body.encode()).hexdigest()[:32]}"
            ca.issued_certificates[arn] = issue(ca, parameters)
            if token is None:
                return json.dumps({"CertificateArn": arn})
            _state.tokens[token] = arn
        return json.dumps({"CertificateArn": _state.tokens[token]})

    def get_certificate(self) -> str:
        parameters = json.loads(self.body)
        ca = self._ca(parameters["CertificateAuthorityArn"])
        arn = parameters["CertificateArn"]
        if arn not in ca.issued_certificates:
            raise refuse("ResourceNotFoundException", "Could not find certificate.")
        _state.asked[arn] = _state.asked.get(arn, 0) + 1
        if _state.asked[arn] <= _state.behaviour.in_progress:
            raise refuse("RequestInProgressException", "The request to issue the certificate is in progress.")
        answer = {"Certificate": ca.issued_certificates[arn].decode()}
        if ca.certificate_bytes:
            above = base64.b64decode(ca.certificate_chain or b"").decode()
            answer["CertificateChain"] = ca.certificate_bytes.decode() + above
        return json.dumps(answer)

    def revoke_certificate(self) -> str:
        parameters = json.loads(self.body)
        ca = self._ca(parameters["CertificateAuthorityArn"])
        serial = parameters["CertificateSerial"]
        known = {x509.load_pem_x509_certificate(pem).serial_number for pem in ca.issued_certificates.values()}
        if int(serial.replace(":", ""), 16) not in known:
            raise refuse("ResourceNotFoundException", "Could not find certificate.")
        if serial in ca.revoked_certificates:
            raise refuse("RequestAlreadyProcessedException", "The certificate is revoked already.")
        answer: str = super().revoke_certificate()
        return answer

    def _ca(self, arn: str) -> CertificateAuthority:
        return self.acmpca_backend.describe_certificate_authority(arn)


def issue(ca: CertificateAuthority, parameters: dict[str, Any]) -> bytes:
    """Make a certificate as the template and the arguments say."""
    name = parameters.get("TemplateArn", "template/EndEntityCertificate/V1").split("/")[-2]
    base, _, variety = name.partition("_API")
    if base not in _USAGES:
        raise refuse("InvalidArgsException", f"The template {name} does not exist.")
    is_root = base == "RootCACertificate"
    if ca.status != ("PENDING_CERTIFICATE" if is_root else "ACTIVE"):
        raise refuse("InvalidStateException", "The certificate authority is not in a valid state for this.")
    try:
        csr = x509.load_pem_x509_csr(base64.b64decode(parameters["Csr"]))
    except ValueError:
        raise refuse("MalformedCSRException", "The certificate signing request is malformed.") from None
    now = datetime.now(UTC).replace(microsecond=0)
    begin = _moment(parameters.get("ValidityNotBefore"), now) or now - timedelta(hours=1)
    end = _moment(parameters["Validity"], now) or now
    _check_end(ca, begin, end, is_root=is_root)
    key: Any = ca.key
    public = csr.public_key()
    is_ca = base.partition("_")[0].endswith("CACertificate")
    builder = (
        x509.CertificateBuilder(ca.issuer, csr.subject, public, x509.random_serial_number(), begin, end)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
    )
    if not is_root:
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        builder = builder.add_extension(authority, False)
    for one in csr.extensions:
        if isinstance(one.value, x509.SubjectAlternativeName):
            builder = builder.add_extension(one.value, one.critical)
    for extension, critical in _usages(base, parameters.get("ApiPassthrough", {}) if variety else {}):
        builder = builder.add_extension(extension, critical)
    return _signed(builder, key, parameters["SigningAlgorithm"]).public_bytes(serialization.Encoding.PEM)


def _usages(base: str, passed: dict[str, Any]) -> Iterable[tuple[x509.ExtensionType, bool]]:
    """The key usages: the template's, or those that are passed where it has none."""
    usages = _USAGES[base]
    flags = dict.fromkeys(
        (
            *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
            *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    extensions = passed.get("Extensions", {})
    if usages is None:
        wanted = extensions.get("ExtendedKeyUsage", [])
        usages = tuple(_NAMED[one["ExtendedKeyUsageType"]] for one in wanted)
        flags["digital_signature"] = extensions.get("KeyUsage", {}).get("DigitalSignature", False)
    elif usages:
        flags |= {"digital_signature": True, "key_encipherment": True}
    else:
        flags |= {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
    if any(flags.values()):
        yield x509.KeyUsage(**flags), True
    if usages:
        yield x509.ExtendedKeyUsage(usages), False


def _moment(validity: dict[str, Any] | None, now: datetime) -> datetime | None:
    match validity:
        case {"Type": "ABSOLUTE", "Value": seconds}:
            return datetime.fromtimestamp(seconds, UTC)
        case {"Type": "DAYS", "Value": days}:
            return now + timedelta(days=days)
    return None


def _check_end(ca: CertificateAuthority, begin: datetime, end: datetime, *, is_root: bool) -> None:
    if is_root:  # the user guide: no checks of validity for root CAs
        return
    if ca.certificate is not None and end > ca.certificate.not_valid_after_utc:
        raise refuse(
            "InvalidArgsException", "The certificate validity exceeds that of the certificate authority."
        )
    if ca.usage_mode == "SHORT_LIVED_CERTIFICATE" and end - begin > timedelta(days=7):
        raise refuse("InvalidArgsException", "A short-lived certificate is valid for seven days at most.")


def _signed(builder: x509.CertificateBuilder, key: Any, algorithm: str) -> x509.Certificate:
    if isinstance(key, mldsa.MLDSA65PrivateKey) and algorithm == "ML_DSA_65":
        return builder.sign(key, None)
    digest, _, family = algorithm.partition("WITH")
    if family == "ECDSA" and isinstance(key, ec.EllipticCurvePrivateKey):
        return builder.sign(key, _HASHES[digest])
    if family == "RSA" and isinstance(key, rsa.RSAPrivateKey):
        return builder.sign(key, _HASHES[digest], rsa_padding=padding.PKCS1v15())
    raise refuse(
        "InvalidArgsException", "The signing algorithm does not fit the key of the certificate authority."
    )


# --- in front of it --------------------------------------------------------------------------------

StartResponse = Callable[..., Any]


class Front:
    """Looks at each request before moto does, as IAM and the front ends of AWS do."""

    def __init__(self, application: Any) -> None:
        self._application = application

    def __call__(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if environ["PATH_INFO"] == "/control":
            return _controlled(environ, body, start)
        target = environ.get("HTTP_X_AMZ_TARGET", "")
        parameters = json.loads(body) if target else {k: v[0] for k, v in parse_qs(body.decode()).items()}
        service = "acm-pca" if target else "sts"
        operation = target.rpartition(".")[2] if target else parameters["Action"]
        _state.calls.append([operation, parameters])
        _state.agents.append(environ["HTTP_USER_AGENT"])
        if _state.behaviour.silent:
            _state.changed.wait(60)
        found = _refusal(environ, body, f"{service}:{operation}", parameters)
        if found is not None:
            return _error(start, is_json=bool(target), code=found[0], message=found[1])
        environ["wsgi.input"] = _Again(body)
        answer: Iterable[bytes] = self._application(environ, start)
        return answer


class _Again:
    def __init__(self, body: bytes) -> None:
        self._body = body

    def read(self, size: int = -1) -> bytes:
        end = len(self._body) if size < 0 else size
        found, self._body = self._body[:end], self._body[end:]
        return found


def _refusal(
    environ: dict[str, Any], body: bytes, action: str, parameters: dict[str, Any]
) -> tuple[str, str] | None:
    behaviour, is_sts = _state.behaviour, action.startswith("sts:")
    operation = action.partition(":")[2]
    signed = _signature(environ, body, is_sts=is_sts)
    if signed is not None:
        return signed
    if behaviour.throttled > 0:
        behaviour.throttled -= 1
        return "Throttling" if is_sts else "ThrottlingException", "Rate exceeded"
    if operation in behaviour.errors:
        return behaviour.errors[operation], "as the test wants it"
    resource = parameters.get("RoleArn") or parameters.get("CertificateAuthorityArn", "*")
    template = parameters.get("TemplateArn")
    is_admin = ADMIN[0] in environ.get("HTTP_AUTHORIZATION", "")
    refused = action in behaviour.denied
    refused |= (
        template is not None and behaviour.templates is not None and template not in behaviour.templates
    )
    refused |= operation == "AssumeRole" and behaviour.external_id != parameters.get("ExternalId")
    if refused and not is_admin:
        message = (
            f"User: arn:aws:iam::{ACCOUNT}:user/builds is not authorized to perform: {action} on resource: "
            f"{resource} because no identity-based policy allows the {action} action"
        )
        return "AccessDenied" if is_sts else "AccessDeniedException", message
    return None


def _signature(environ: dict[str, Any], body: bytes, *, is_sts: bool) -> tuple[str, str] | None:
    """Check the signature, version 4, as botocore makes it; None if it holds."""
    found = re.match(
        r"AWS4-HMAC-SHA256 Credential=([^/]+)/[0-9]+/([^/]+)/([^/]+)/aws4_request, "
        r"SignedHeaders=([^,]+), Signature=([0-9a-f]+)",
        environ.get("HTTP_AUTHORIZATION", ""),
    )
    if found is None:
        return "MissingAuthenticationToken", "Missing Authentication Token"
    identity, region, service, names, signature = found.groups()
    token = environ.get("HTTP_X_AMZ_SECURITY_TOKEN")
    secret = _secret(identity, token)
    if secret is None:
        code = "InvalidClientTokenId" if is_sts else "UnrecognizedClientException"
        return code, "The security token included in the request is invalid."
    if token is not None and _state.behaviour.expired:
        return "ExpiredToken" if is_sts else "ExpiredTokenException", "The security token has expired"
    headers = {
        name: environ.get("HTTP_" + name.upper().replace("-", "_")) or environ[name.upper().replace("-", "_")]
        for name in names.split(";")
    }
    request = AWSRequest("POST", f"http://{environ['HTTP_HOST']}/", headers, body)
    request.context["timestamp"] = environ["HTTP_X_AMZ_DATE"]
    auth = SigV4Auth(Credentials(identity, secret, token), service, region)
    canonical = auth.canonical_request(request)
    if auth.signature(auth.string_to_sign(request, canonical), request) != signature:
        message = (
            "The request signature we calculated does not match the signature you provided.\n\n"
            f"The Canonical String for this request should have been\n'{canonical}'"
        )
        return "SignatureDoesNotMatch" if is_sts else "InvalidSignatureException", message
    return None


def _secret(identity: str, token: str | None) -> str | None:
    """Find the secret key of an access key; a session token has to be its own."""
    known: dict[tuple[str, str | None], str] = {(one, None): secret for one, secret in (ADMIN, BUILDS)}
    known[TEMPORARY[0], TEMPORARY[2]] = TEMPORARY[1]
    for role in sts_backends[ACCOUNT]["aws"].assumed_roles:
        known[role.access_key_id, role.session_token] = role.secret_access_key
    return known.get((identity, token))


def _error(start: StartResponse, *, is_json: bool, code: str, message: str) -> list[bytes]:
    if is_json:
        body = json.dumps({"__type": code, "message": message}).encode()
    else:
        body = (
            f"<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message><![CDATA[{message}]]></Message>"
            "</Error><RequestId>1</RequestId></ErrorResponse>"
        ).encode()
    start("400 Bad Request", [("Content-Type", "application/x-amz-json-1.1" if is_json else "text/xml")])
    return [body]


def _controlled(environ: dict[str, Any], body: bytes, start: StartResponse) -> list[bytes]:
    if environ["REQUEST_METHOD"] == "POST":
        _state.behaviour = Behaviour(**json.loads(body))
        _state.calls.clear()
        _state.agents.clear()
        changed, _state.changed = _state.changed, threading.Event()
        changed.set()
    start("200 OK", [("Content-Type", "application/json")])
    seen = {"behaviour": asdict(_state.behaviour), "calls": _state.calls, "agents": _state.agents}
    return [json.dumps(seen).encode()]


class _Quiet(MotoRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 - werkzeug's name
        pass


def main(arguments: list[str]) -> None:
    """Serve on loopback, with TLS if a certificate and a key are named; print the port."""
    import moto.acmpca.urls

    moto.acmpca.urls.url_paths["{0}/$"] = Responses.dispatch
    context = None
    if arguments:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*arguments)
    application = Front(DomainDispatcherApplication(create_backend_app))
    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=_Quiet, ssl_context=context
    )
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
