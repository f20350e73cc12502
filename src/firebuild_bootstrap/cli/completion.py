"""`firebuild completion`: what the shells bash, zsh and fish offer for the word at the cursor.

A script of some lines asks this program at each Tab, in `_FIREBUILD_COMPLETE`, and gives it the line up to
the cursor as it is. The words are found here, in one way for all: bash breaks its own at `:` and `=`, so that
the tag `app:1` would be three of them, and neither zsh nor fish takes a value of `--option=value` without the
option.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import Any, Final

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class

PROGRAM: Final = "firebuild"
VARIABLE: Final = "_FIREBUILD_COMPLETE"
"""What a shell asks with: SHELL_complete, or SHELL_source for its script."""

BEGINNINGS: Final[dict[str, tuple[str, ...]]] = {
    "--attest": ("type=provenance", "type=provenance,mode=min", "type=provenance,mode=max", "type=sbom"),
    "--cache-from": ("type=registry,ref=", "type=local,src="),
    "--cache-to": ("type=registry,ref=", "type=local,dest="),
    "--filter": ("until=", "label=", "label!="),
    "--output": ("ext4", "erofs", "squashfs", "tar", "dir", "oci", "docker", "registry"),
    "--provenance": ("true", "false", "mode=min", "mode=max"),
    "--pull": ("missing", "always", "never"),
    "--sbom": ("true", "false"),
    "--secret": ("id=",),
    "--ssh": ("default",),
}
"""What the values of options begin with whose type does not say it."""
REFUSED: Final = {
    "cache prune": ("label=", "label!="),
    "images export": ("registry",),
    "run": ("external",),
}
"""Of these and of the machines, what a command does not take."""
FILES: Final = frozenset({"--dockerfile", "--file", "-f", "--image-config", "--ssh-key"})
DIRECTORIES: Final = frozenset({"--context", "--keep-on-failure"})
BEHIND_EQUALS: Final = frozenset(
    {"--build-context", "--cache-from", "--cache-to", "--output", "-o", "--secret", "--ssh", "--ssh-key"}
)
"""Options in whose values there is a path after the last `=`."""
_LINE: Final = "COMP_LINE"
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\+?=")

# A file is offered by the shell itself, which knows about ~, quotes and colours.
_BASH: Final = """\
_firebuild() {
    local kind value
    COMPREPLY=()
    while IFS=$'\\t' read -r kind value; do
        case $kind in
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
            open) compopt -o nospace; COMPREPLY+=("$value") ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        _FIREBUILD_COMPLETE=bash_complete "${1/#\\~/$HOME}" 2>/dev/null)
}
complete -o nosort -F _firebuild firebuild
"""
_ZSH: Final = """\
#compdef firebuild
_firebuild() {
    local kind value about
    local -a plain shown open
    while IFS=$'\\t' read -r kind value about; do
        case $kind in
            file) compset -P "${(b)value}"; _files ;;
            dir) compset -P "${(b)value}"; _files -/ ;;
            open) open+=("$value") ;;
            plain) plain+=("$value"); shown+=("$value${about:+  -- $about}") ;;
        esac
    done < <(COMP_LINE="${(j: :)words[1,CURRENT-1]} $PREFIX" _FIREBUILD_COMPLETE=zsh_complete \\
        ${~words[1]} 2>/dev/null)
    (( $#plain )) && compadd -V plain -l -d shown -a plain
    (( $#open )) && compadd -V open -S '' -a open
    return 0
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _firebuild "$@"
else
    compdef _firebuild firebuild
fi
"""
_FISH: Final = """\
function __firebuild_complete
    set -l token (commandline -ct)
    set -l program (string replace -r -- '^~' $HOME (commandline -opc)[1])
    set -lx COMP_LINE (commandline -cp | string collect)
    set -lx _FIREBUILD_COMPLETE fish_complete
    for answer in ($program 2>/dev/null)
        set -l parts (string split -m 1 -- \\t $answer)
        set -l rest (string sub -s (math 1 + (string length -- "$parts[2]")) -- $token)
        switch $parts[1]
            case file
                printf '%s\\n' $parts[2](__fish_complete_path $rest)
            case dir
                printf '%s\\n' $parts[2](__fish_complete_directories $rest '')
            case open plain
                printf '%s\\n' $parts[2]
        end
    end
end
complete --no-files --keep-order --command firebuild --arguments '(__firebuild_complete)'
"""


class _Complete(ShellComplete):
    """What is the same for all shells.

    Each answer is a line: its kind, a tab, the word. The kind is `plain`, `open` for a word that goes on, so
    that no space comes behind it, or `file` or `dir` for a path, with what stands before it in the same word.
    """

    def source(self) -> str:
        """Return the script that the shell reads."""
        return self.source_template

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words after the name of the program, and the one at the cursor."""
        words, incomplete = split_line(os.environ.get(_LINE, ""))
        while words and _ASSIGNMENT.match(words[0]):  # NAME=value firebuild …
            del words[0]
        names = [os.path.basename(word) for word in words]
        begin = names.index(PROGRAM) if PROGRAM in names else 0  # sudo firebuild …
        return words[begin + 1 :], incomplete

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """Return what the word at the cursor can become, as whole words; of a path, what goes before it."""
        given = list(args)
        name, equals, value = incomplete.partition("=")
        joined = equals if name.startswith("--") and "--" not in args else ""
        if not joined:
            name, value = (args[-1] if args else ""), incomplete
        found = super().get_completions(given, incomplete) or _values(name, value)
        refused = REFUSED.get(" ".join(args[:2]), REFUSED.get(args[0], ()) if args else ())
        found = [item for item in found if item.value not in refused]
        for item in found:
            is_path = item.type in ("file", "dir")
            before = value.rpartition("=")[0] if name in BEHIND_EQUALS else ""
            item.value = (f"{before}=" if before else "") if is_path else item.value
            if joined:
                item.value = f"{name}={item.value}"
        return found

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Write an answer as the script reads it."""
        return f"{_kind(item)}\t{item.value}"


@add_completion_class
class _Bash(_Complete):
    name = "bash"
    source_template = _BASH

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        found = super().get_completions(args, incomplete)
        done = self._done(incomplete)
        for item in found:
            item.value = item.value[done:]
        return found

    def _done(self, incomplete: str) -> int:
        """Return how many characters of the word bash leaves alone: those up to the last break.

        A word in quotes has no breaks (bash(1), COMP_WORDBREAKS).
        """
        line = os.environ.get(_LINE, "")
        if not line.endswith(incomplete) or line[: len(line) - len(incomplete)].endswith(("'", '"')):
            return 0
        breaks = set(os.environ.get("COMP_WORDBREAKS", "=:"))
        return max((at + 1 for at, char in enumerate(incomplete) if char in breaks), default=0)


class _Described(_Complete):
    def format_completion(self, item: CompletionItem[Any]) -> str:
        about = " ".join((item.help or "").split())
        return super().format_completion(item) + (f"\t{about}" if about else "")


@add_completion_class
class _Zsh(_Described):
    name = "zsh"
    source_template = _ZSH


@add_completion_class
class _Fish(_Described):
    name = "fish"
    source_template = _FISH


_SHELLS: Final[dict[str, type[_Complete]]] = {shell.name: shell for shell in (_Bash, _Zsh, _Fish)}


def _values(option: str, incomplete: str) -> list[CompletionItem[str]]:
    known = BEGINNINGS.get({"-o": "--output"}.get(option, option), ())
    if found := [CompletionItem(word) for word in known if word.startswith(incomplete)]:
        return found
    if option in FILES or (option in BEHIND_EQUALS and "=" in incomplete):
        return [CompletionItem("", type="file")]
    return [CompletionItem("", type="dir")] if option in DIRECTORIES else []


def _kind(item: CompletionItem[Any]) -> str:
    if item.type == "plain" and str(item.value).endswith(("=", ",")):
        return "open"
    return item.type


def split_line(line: str) -> tuple[list[str], str]:
    """Split a command line up to the cursor into its finished words and the one that is being written.

    Quotes and backslashes are taken away as a shell does; the last word may lack its closing quote.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    try:
        words.extend(lexer)
    except ValueError:  # an open quote, or a backslash at the end
        return words, lexer.token or ""
    if not words or line[-1:].isspace():
        return words, ""
    return words[:-1], words[-1]


@click.command()
@click.argument("shell", type=click.Choice(sorted(_SHELLS)))
def completion(shell: str) -> None:
    """Print the shell script that completes firebuild's commands, options and their values.

    \b
    bash, in ~/.bashrc:                    eval "$(firebuild completion bash)"
    zsh, in ~/.zshrc, after compinit:     eval "$(firebuild completion zsh)"
    fish, in ~/.config/fish/config.fish:   firebuild completion fish | source

    Images, bases and CA providers are looked up when Tab is pressed, in the store of the line's --config or
    of the environment.
    """
    click.echo(_SHELLS[shell].source_template, nl=False)
