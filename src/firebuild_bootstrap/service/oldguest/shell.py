"""Shell text for old guests: POSIX sh, with options that the tools of GNU and of busybox share."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from typing import Final

from firebuild_bootstrap import wire

# Exec takes no longer argument (MAX_ARG_STRLEN in linux/binfmts.h), its NUL included.
MAX_SCRIPT_BYTES: Final = 128 * 1024 - 1
_MAX_LINE_BYTES: Final = 60_000

# `say` writes a mark, `begin` the first one of a step on both streams, `die` why it failed before it ends.
# `mk` makes a directory and the missing ones above it. `user` and `owner` look names up in the image's own
# files, by the rules of guest/users.py.
_LIBRARY: Final = r"""
PATH=%(path)s LC_ALL=C; export PATH LC_ALL; unset CDPATH ENV IFS; umask 022; cd /
S=%(staging)s STEP=%(step)d
say() { printf '\001%(nonce)s:%%s:%%s:%%s\002\n' "$1" "$STEP" "$2"; }
begin() { say B ''; say B '' >&2; }
die() { say X "$1"; exit 1; }
failed() { die "the files could not be put in their place; the output says what failed"; }
mk() {
  left=$1 made=
  while [ -n "$left" ]; do
    part=${left%%%%/*}
    case $left in */*) left=${left#*/} ;; *) left= ;; esac
    [ -n "$part" ] || continue
    made=$made/$part
    [ -d "$made" ] && continue
    if [ -e "$made" ] || [ -L "$made" ]; then die "$made: a file is where a directory is needed"; fi
    mkdir "$made" && chown "$2" "$made" && chmod 00755 "$made" || die "$made: it could not be made"
  done
}
number() { case $1 in '' | *[!0-9]*) return 1 ;; esac; }
passwd() {
  [ -f /etc/passwd ] || return 1
  while IFS= read -r line || [ -n "$line" ]; do
    case $line in :*) continue ;; *:*:*:*:*:*) ;; *) continue ;; esac
    name=${line%%%%:*} rest=${line#*:}; rest=${rest#*:}
    uid=${rest%%%%:*} rest=${rest#*:}; gid=${rest%%%%:*} rest=${rest#*:}
    rest=${rest#*:}; home=${rest%%%%:*}
    number "$uid" && number "$gid" || continue
    case $1 in name) [ "$name" = "$2" ] && return ;; *) [ "$uid" = "$2" ] && return ;; esac
  done < /etc/passwd
  return 1
}
groups() {
  [ -f /etc/group ] || return 0
  while IFS= read -r line || [ -n "$line" ]; do
    case $line in :*) continue ;; *:*:*:*) ;; *) continue ;; esac
    rest=${line#*:}; rest=${rest#*:}; id=${rest%%%%:*} rest=${rest#*:}
    number "$id" || continue
    "$1" "$2" "${line%%%%:*}" "$id" ",${rest%%%%:*},"
  done < /etc/group
}
named() { if [ -z "$R" ] && [ "$1" = "$2" ]; then R=$3; fi; }
member() { case $4 in *,"$1",*) [ "$3" = "$G" ] || L=$L,$3 ;; esac; }
group() {
  R=; if number "$2"; then R=$2; else groups named "$2"; fi
  [ -n "$R" ] ||
    die "$1: /etc/group of the image has no '$2'; create it first or use a number"
}
user() {
  want=${1%%%%:*} wanted_group=; case $1 in *:*) wanted_group=${1#*:} ;; esac
  [ -n "$want" ] || want=0
  N= U=$want G=0 H=
  if number "$want"; then ! passwd uid "$want" || N=$name U=$uid G=$gid H=$home
  elif passwd name "$want"; then N=$name U=$uid G=$gid H=$home
  else
    die "USER $1: /etc/passwd of the image has no '$want'; create it first or use a number"
  fi
  if [ -n "$wanted_group" ]; then group "USER $1" "$wanted_group"; G=$R L=$G
  else L=$G; [ -z "$N" ] || groups member "$N"; fi
  [ -n "$H" ] || if [ "$U" = 0 ]; then H=/root; else H=/; fi
}
owner() {
  want=${1%%%%:*} wanted_group=; case $1 in *:*) wanted_group=${1#*:} ;; esac
  if number "$want"; then O=$want gid=$want
  elif passwd name "$want"; then O=$uid
  else die "--chown=$1: /etc/passwd of the image has no '$want'; create it first or use a number"; fi
  if [ -n "$wanted_group" ]; then group "--chown=$1" "$wanted_group"; gid=$R; fi
  O=$O:$gid
}
"""


def library(*, nonce: str, staging: str, step: int) -> str:
    """Return the functions, with the marks of one step.

    Args:
        nonce: what begins the marks of this build.
        staging: absolute path of the directory for files under way; in the shell it is `$S`.
        step: number of the step, 0 before the first.
    """
    return _LIBRARY % {"path": wire.DEFAULT_PATH, "staging": staging, "nonce": nonce, "step": step}


def words(arguments: Iterable[str]) -> str:
    """Quote arguments for a command line."""
    return " ".join(map(shlex.quote, arguments))


def lines(command: str, arguments: Iterable[str]) -> Iterator[str]:
    """Repeat `command` so often that no line gets too long for what it executes; none for no arguments."""
    collected: list[str] = []
    size = 0
    for argument in arguments:
        length = len(argument.encode()) + 8
        if collected and size + length > _MAX_LINE_BYTES:
            yield f"{command} {words(collected)} || failed"
            collected, size = [], 0
        collected.append(argument)
        size += length
    if collected:
        yield f"{command} {words(collected)} || failed"
