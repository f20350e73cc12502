"""What a mistake in the files of a CA ends in."""

from __future__ import annotations

import pytest

from firebuild_pki import CAError
from pki_file.operator_files import Shop, opened


def refusal(usual: Shop, **block: object) -> CAError:
    """What opening says, with the usual root where nothing else is given."""
    given = {"ca_cert": usual.path("root.pem"), "ca_key": usual.path("root.key"), **block}
    with pytest.raises(CAError) as caught:
        opened(given)
    assert str(caught.value).startswith("ca-provider(file): ")
    return caught.value
