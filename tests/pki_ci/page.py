"""The page on CI as a machine reads it: its files, its commands, its jobs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from support import REPO

PAGE = REPO / "docs" / "vault-in-ci.md"

_BLOCK = re.compile(r"^```(\w+)\n# (\S+).*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> dict[str, str]:
    """Return the page's blocks of code by the first word of their title, a comment in the first line."""
    return {title.rstrip(":"): body for _, title, body in _BLOCK.findall(PAGE.read_text(encoding="utf-8"))}


_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fenced(page: Path) -> dict[str, str]:
    """The blocks of a page by their titles, a comment in the first line, which is part of them."""
    found = _FENCED.finditer(page.read_text(encoding="utf-8"))
    return {match[2].split("\n", 1)[0].lstrip("# ").split(" ")[0].rstrip(":"): match[2] for match in found}


@dataclass(frozen=True)
class Job:
    """What a CI system does with a job.

    Args:
        shell: command that a step's script is given to, as a file.
        environ: variables of the job.
        steps: scripts by their titles.
        document: the job as it is on the page.
    """

    shell: tuple[str, ...]
    environ: dict[str, str]
    steps: dict[str, str]
    document: dict[str, Any]


def github_job() -> tuple[Job, dict[str, Any]]:
    """Return the job for GitHub, and its workflow."""
    workflow = yaml.safe_load(blocks()[".github/workflows/image.yml"])
    (job,) = workflow["jobs"].values()
    # https://docs.github.com/actions/reference/workflows-and-actions/workflow-syntax: what `shell: bash` runs
    assert job["defaults"]["run"]["shell"] == "bash"
    shell = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
    steps = {step["name"]: step["run"] for step in job["steps"] if "run" in step}
    return Job(shell, job["env"], steps, job), workflow


def gitlab_job() -> Job:
    """Return the job for GitLab. All lines of a script run in one shell and stop at the first failure."""
    (job,) = yaml.safe_load(blocks()[".gitlab-ci.yml"]).values()
    steps = {name: "\n".join(job[name]) for name in ("before_script", "script")}
    return Job(("bash", "-eo", "pipefail"), job["variables"], steps, job)
