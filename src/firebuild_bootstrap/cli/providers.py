"""`firebuild ca providers`: what is installed."""

from __future__ import annotations

from collections.abc import Sequence

import click

from firebuild_bootstrap.cli.screen import beside_head, styled
from firebuild_pki.display import one_line
from firebuild_pki.preflighting import ListedProvider


def print_providers(listed: Sequence[ListedProvider]) -> None:
    """Print a block for each provider; a broken one shows why it is."""
    head_width = max((len(one_line(one.name)) for one in listed), default=0) + 2
    for one in listed:
        name = styled(one_line(one.name), bold=True, **({} if one.problem is None else {"fg": "red"}))
        can = ", ".join(one.capabilities) if one.problem is None else "cannot be used"
        _print(name, head_width, f"{one.distribution} {one.version}".strip() + f" ({can})")
        _print("", head_width, one.summary if one.problem is None else one.problem)
        if one.hint:
            _print("", head_width, f"hint: {one.hint}")
        _print("", head_width, one.location)


def _print(head: str, head_width: int, text: str) -> None:
    lines = [line for line in beside_head(head, head_width, text) if line]
    click.echo("\n".join(lines))
