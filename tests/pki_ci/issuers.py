"""The tokens of CI systems, with the claims that they document, and GitHub's endpoint that hands them out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from baoserver import JwtIssuer
from support import serving

AUDIENCE = "https://vault.example"


def github_claims(
    repository: str = "example/images", branch: str = "main", event: str = "push"
) -> dict[str, Any]:
    """Return the claims of a job (GitHub: "OpenID Connect reference")."""
    owner = repository.partition("/")[0]
    ref = f"refs/heads/{branch}"
    workflow = f"{repository}/.github/workflows/image.yml@{ref}"
    return {
        "sub": f"repo:{repository}:ref:{ref}",
        "repository": repository,
        "repository_owner": owner,
        "repository_visibility": "private",
        "ref": ref,
        "ref_type": "branch",
        "ref_protected": "true",
        "event_name": event,
        "actor": "octocat",
        "workflow": "image",
        "workflow_ref": workflow,
        "job_workflow_ref": workflow,
        "runner_environment": "github-hosted",
        "run_number": "7",
    }


def gitlab_claims(
    project: str = "example/images", branch: str = "main", protected: str = "true"
) -> dict[str, Any]:
    """Return the claims of a job (GitLab: "OpenID Connect authentication using ID tokens")."""
    return {
        "sub": f"project_path:{project}:ref_type:branch:ref:{branch}",
        "project_path": project,
        "namespace_path": project.partition("/")[0],
        "ref": branch,
        "ref_type": "branch",
        "ref_path": f"refs/heads/{branch}",
        "ref_protected": protected,
        "pipeline_source": "push",
        "user_login": "me",
    }


@dataclass
class Endpoint:
    """GitHub's endpoint for one job.

    Args:
        issuer: signs the tokens.
        claims: of the job.
        bearer: what the runner gives to the job, to ask with.
    """

    issuer: JwtIssuer
    claims: Mapping[str, Any]
    bearer: str = "runner-bearer-4711"
    tokens: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def environ(self) -> dict[str, str]:
        """What the runner sets when the job may have tokens (`id-token: write`)."""
        url = f"http://127.0.0.1:{self.port}/idtoken?api-version=2.0"
        return {"ACTIONS_ID_TOKEN_REQUEST_URL": url, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.bearer}

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, Any]]:
        """Answer one request."""
        query = parse_qs(urlsplit(path).query)
        if authorization != f"Bearer {self.bearer}" or query.get("api-version") != ["2.0"]:
            return 401, {"message": "not for you"}
        token = self.issuer.token(**self.claims, aud=query["audience"][0])
        self.tokens.append(token)
        return 200, {"count": len(token), "value": token}

    @contextmanager
    def serving(self) -> Iterator[Endpoint]:
        """Serve on loopback."""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = endpoint.answer(self.path, self.headers["Authorization"])
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = server.server_port
        with serving(server):
            yield self
