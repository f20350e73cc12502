"""The calls of AWS Private CA and STS that signing needs: credentials, limits, refusals.

botocore is the part of boto3 that finds credentials, signs requests and sends them. It is imported when the
first client is made: that takes longer than all else of a start.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from firebuild_pki.addresses import is_loopback
from firebuild_pki.http import read_anchors

from firebuild_pki_aws_pca.refusals import Asked, Refused, unanswered
from firebuild_pki_aws_pca.settings import AwsPcaSettings

EARLY = timedelta(minutes=5)
"""Credentials of a role are renewed this long before they end."""

# Nothing of the environment or of ~/.aws counts beside explicit credentials: not even a profile that does not
# exist, which botocore would not put up with. (Setting in a file, variable, default, conversion.)
_ALONE = {
    "profile": (None, None, None, None),
    "config_file": (None, None, os.devnull, None),
    "credentials_file": (None, None, os.devnull, None),
}
_filters = threading.Lock()


class Client:
    """AWS Private CA in one region, with the credentials that the settings lead to.

    Args:
        settings: the block ``ca.aws-pca``.
        environ: where secrets are; botocore itself looks at the environment of the process.
        clock: the current time.
        patient: whether to try again what may pass.
        build_id: whom the certificates are for; empty where no build is at hand.

    Raises:
        CAError: there are no credentials, a role cannot be assumed, or `ca_file` cannot be read.
    """

    def __init__(
        self,
        settings: AwsPcaSettings,
        environ: Mapping[str, str],
        clock: Callable[[], datetime],
        *,
        patient: bool = True,
        build_id: str = "",
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._attempts = settings.attempts if patient else 1
        self._region = settings.region
        self._user_agent = f"firebuild build/{build_id}" if build_id else "firebuild"
        self._clients: list[Any] = []
        self._expires: datetime | None = None
        self._verify: bool | str = True  # not None, with which AWS_CA_BUNDLE and REQUESTS_CA_BUNDLE count
        if settings.ca_file is not None:
            read_anchors(settings.ca_file, "ca_file")
            self._verify = os.path.expanduser(settings.ca_file)
        keys = settings.access_key
        refs = () if keys is None else (keys.id, keys.secret, keys.session_token)
        self._keys = tuple(ref.resolve(environ) if ref else None for ref in refs)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections, and forget the credentials."""
        self._disconnect()
        self._keys = ()

    def _disconnect(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    def ask(self, operation: str, template: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Ask AWS Private CA about the CA of the settings.

        Args:
            operation: in botocore's spelling, ``issue_certificate``.
            template: ARN of the template that is asked for, for the message of a refusal.
            parameters: all but CertificateAuthorityArn.

        Raises:
            Refused: AWS said no.
            CAError: there was no answer.
        """
        if self._expires is not None and self._clock() > self._expires - EARLY:
            self._connect()
        arn = self._settings.certificate_authority_arn
        return self._call(self._pca, operation, arn, template, CertificateAuthorityArn=arn, **parameters)

    def identity(self) -> str:
        """Return the ARN of whom AWS takes us for; needs no permission."""
        return str(self._call(self._sts(), "get_caller_identity", "*")["Arn"])

    def _connect(self) -> None:
        """Make the client anew, with credentials of the role where there is one."""
        self._disconnect()
        self._session = self._make_session(self._keys)
        role = self._settings.role_arn
        if role is not None:
            session = {"RoleArn": role, "RoleSessionName": self._settings.role_session_name}
            if self._settings.external_id is not None:
                session["ExternalId"] = self._settings.external_id
            found = self._call(self._sts(), "assume_role", role, **session)["Credentials"]
            self._expires = found["Expiration"]
            keys = (found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"])
            self._session = self._make_session(keys)
        self._pca = self._make_client("acm-pca", self._settings.endpoint_url)

    def _sts(self) -> Any:
        return self._make_client("sts", self._settings.sts_endpoint_url)

    def _make_session(self, keys: tuple[str | None, ...]) -> Any:
        with self._worded("endpoint_url", "AWS"), silenced_debug():
            from botocore.session import Session

            session = Session(_ALONE) if keys else Session(profile=self._settings.profile)
            if keys:
                session.set_credentials(*keys)
            session.register_component("data_loader", _loader())
        return session

    def _make_client(self, service: str, endpoint: str | None) -> Any:
        with self._worded("endpoint_url", "AWS"), silenced_debug():
            from botocore.config import Config

            seconds = self._settings.timeout.total_seconds()
            config = Config(
                connect_timeout=seconds,
                read_timeout=seconds,
                retries={"mode": "standard", "total_max_attempts": self._attempts},
                ignore_configured_endpoint_urls=True,  # AWS_ENDPOINT_URL may be plain http, and anywhere
                proxies={} if is_loopback(urlsplit(endpoint or "").hostname or "") else None,  # None: environ
                user_agent_extra=self._user_agent,  # CloudTrail keeps it
            )
            client = self._session.create_client(
                service, region_name=self._region, endpoint_url=endpoint, verify=self._verify, config=config
            )
        self._clients.append(client)
        return client

    def _call(
        self, client: Any, operation: str, resource: str, template: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        service = client.meta.service_model.endpoint_prefix
        name = client.meta.method_to_api_mapping[operation]
        setting = "sts_endpoint_url" if service == "sts" else "endpoint_url"
        try:
            with self._worded(setting, client.meta.endpoint_url), silenced_debug():
                answer: dict[str, Any] = getattr(client, operation)(**parameters)
        except ClientError as error:
            asked = Asked(f"{service}:{name}", resource, self._region, template)
            if error.operation_name != name:  # botocore's own, on its way to the credentials of a role
                asked = Asked(
                    f"sts:{error.operation_name}", "the role that AWS's configuration names", self._region
                )
            found = error.response.get("Error", {})
            raise Refused(str(found.get("Code", "")), str(found.get("Message", "")), asked) from None
        return answer

    @contextmanager
    def _worded(self, setting: str, endpoint: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except BotoCoreError as error:
            raise unanswered(error, endpoint=endpoint, region=self._region, setting=setting) from None


@cache
def _loader() -> Any:
    """Return what reads botocore's descriptions of AWS, for all builds: a session's own reads them anew."""
    from botocore.loaders import create_loader

    return create_loader()


@contextmanager
def silenced_debug() -> Iterator[None]:
    """Keep botocore's debug log of this thread unwritten: it has session tokens, and STS's whole answers.

    Filters are of the loggers, and so of the process: each looks at its own thread's records alone, and is
    gone at the end. The lists are replaced, as another thread may be walking through the old one.
    """
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno > logging.DEBUG

    loggers = [
        one
        for name, one in list(logging.root.manager.loggerDict.items())
        if name.split(".")[0] == "botocore" and isinstance(one, logging.Logger)
    ]
    with _filters:
        for logger in loggers:
            logger.filters = [*logger.filters, passes]
    try:
        yield
    finally:
        with _filters:
            for logger in loggers:
                logger.filters = [one for one in logger.filters if one is not passes]
