"""What a refusal of cfssl means, and what to do about it.

``cfssl serve`` and ``multirootca`` word the same refusal differently, and the number that comes
with it says little, as most refusals share it. So it is the words that count.
"""

from __future__ import annotations

from firebuild_pki import CAError

MAX_QUOTE = 200
"""Characters of a server's own words that a message repeats."""

# What the server says, in lower case; what that comes down to; what to change.
_MEANINGS = (
    (
        "invalid token",
        "the server does not accept the authentication key",
        'auth_key has to be the key that profile "{profile}" names in the server\'s auth_keys',
    ),
    *(
        (
            said,
            'profile "{profile}" signs without authentication, which is not used here',
            'give profile "{profile}" an auth_key in the server\'s configuration',
        )
        for said in ("no authentication provider", "authorisation required")
    ),
    (
        "invalid profile",
        'the server has no profile "{profile}"',
        "compare server_profile and guest_profile with the profiles in the server's configuration",
    ),
    (
        "bad label",
        'the server has no CA with the label "{label}"',
        "label has to be a section of the file that multirootca gets with -roots",
    ),
    (
        "not authorised",
        "the server does not serve the address of this machine",
        'add it to nets of the section "{label}" in the file that multirootca gets with -roots',
    ),
    (
        "policy whitelist",
        'the name_whitelist of profile "{profile}" does not let the name through',
        "it has to match <build-id>.<name_suffix> for servers, guest.<build-id>.<name_suffix> for guests",
    ),
    (
        "bad request",
        "the server does not say why it refuses the request",
        'its log does; mostly it is the name_whitelist of profile "{profile}"',
    ),
)


class Refused(CAError):
    """The server understood a request and said no.

    Args:
        said: the server's own words.
        profile: the profile that was asked for.
        label: the label that was asked for.
    """

    def __init__(self, said: str, *, profile: str, label: str) -> None:
        self.said = said.lower()
        quote = " ".join(said.split())[:MAX_QUOTE]
        names = {"profile": profile, "label": label}
        for words, what, hint in _MEANINGS:
            if words in self.said:
                message = f'{what.format(**names)} (cfssl: "{quote}")'
                super().__init__(message, hint=hint.format(**names))
                return
        super().__init__(f'cfssl refused the request: "{quote}"')
