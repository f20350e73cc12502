"""What old guests are told: commands as JSON, and the shell text in them.

That is POSIX sh, with options that the tools of GNU and of busybox share: the library, and on it the scripts
for RUN and WORKDIR and the one that looks at the image before the first step. That for COPY is in copying.py.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from firebuild_bootstrap import wire

# Exec takes no longer argument (MAX_ARG_STRLEN in linux/binfmts.h), its NUL included.
MAX_SCRIPT_BYTES: Final = 128 * 1024 - 1
_MAX_LINE_BYTES: Final = 60_000

# `say` writes a mark, `begin` the first one of a step on both streams, `die` why it failed before it ends; it
# leaves nothing in the root, which the user may keep (`--keep-on-failure`).
# `mk` makes a directory and the missing ones above it. `user` and `owner` look names up in the image's own
# files, by the rules of guest/users.py.
_LIBRARY: Final = r"""
PATH=%(path)s LC_ALL=C; export PATH LC_ALL; unset CDPATH ENV IFS; umask 022; cd /
S=%(staging)s STEP=%(step)d
say() { printf '\001%(nonce)s:%%s:%%s:%%s\002\n' "$1" "$STEP" "$2"; }
begin() { say B ''; say B '' >&2; }
die() { cd /; rm -rf "$S" 2>/dev/null; say X "$1"; exit 1; }
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
    mkdir "$made" && chown "$2" "$made" || die "$made: it could not be made"
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
  [ -n "$R" ] || [ "$2" != root ] || R=0
  [ -n "$R" ] ||
    die "$1: /etc/group of the image has no '$2'; create it first or use a number"
}
user() {
  want=${1%%%%:*} wanted_group=; case $1 in *:*) wanted_group=${1#*:} ;; esac
  [ -n "$want" ] || want=0
  N= U=$want G=0 H=
  if number "$want"; then ! passwd uid "$want" || N=$name U=$uid G=$gid H=$home
  elif passwd name "$want"; then N=$name U=$uid G=$gid H=$home
  elif [ "$want" = root ]; then U=0
  else
    die "USER $1: /etc/passwd of the image has no '$want'; create it first or use a number"
  fi
  if [ -n "$wanted_group" ]; then group "USER $1" "$wanted_group"; G=$R L=$G
  else L=$G; [ -z "$N" ] || groups member "$N"; fi
  [ -n "$H" ] || H=/
}
owner() {
  want=${1%%%%:*} wanted_group=; case $1 in *:*) wanted_group=${1#*:} ;; esac
  if number "$want"; then O=$want gid=$want
  elif passwd name "$want"; then O=$uid
  elif [ "$want" = root ]; then O=0 gid=0
  else die "--chown=$1: /etc/passwd of the image has no '$want'; create it first or use a number"; fi
  if [ -n "$wanted_group" ]; then group "--chown=$1" "$wanted_group"; gid=$R; fi
  O=$O:$gid
}
"""

_ROOT: Final = ("", "0", "root")
_ALWAYS: Final = ("chmod", "chown", "env", "mkdir", "rm")
_FOR_FILES: Final = ("cat", "ln", "mv", "readlink", "sha256sum", "stat", "touch")

# The shell of busybox may prefer programs of its own to those in PATH, and its setpriv knows no users.
_PROGRAMS: Final = r"""
program() {
  R=
  for place in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
    if [ -z "$R" ] && [ -x "$place/$1" ]; then R=$place/$1; fi
  done
  [ -n "$R" ]
}
by_setpriv() {
  program setpriv && "$R" --reuid="$1" --regid="$2" --groups="$3" /bin/sh -c : 2>/dev/null
}
by_chroot() {
  program chroot && "$R" --userspec="$1:$2" --groups="$3" --skip-chdir / /bin/sh -c : 2>/dev/null
}
"""

# `become` finds out how to become the user that `user` found, `as_user` executes $1 as that user. HOME is
# told through a variable, because su sets its own.
_AS_USER: Final = r"""
become() {
  if [ "$U:$G" = 0:0 ]; then HOW=
  elif by_setpriv "$U" "$G" "$L"; then HOW=setpriv
  elif by_chroot "$U" "$G" "$L"; then HOW=chroot
  elif [ -n "$N" ] && [ -z "$wanted_group" ] && program su; then HOW=su
  else die "USER $1: the image has nothing that becomes this user; the guest's vminit is too old to do it"; fi
  FB_HOME=$H; export FB_HOME
}
as_user() {
  case $HOW in
    setpriv) "$R" --reuid="$U" --regid="$G" --groups="$L" /bin/sh -c "$1" ;;
    chroot) "$R" --userspec="$U:$G" --groups="$L" --skip-chdir / /bin/sh -c "$1" ;;
    su) "$R" -s /bin/sh "$N" -c "$1" ;;
    *) /bin/sh -c "$1" ;;
  esac
}
"""

# An old guest reads 32 KiB at a time and passes nothing on that is not UTF-8, half a character included. So
# output becomes marks with base64 in them, piece by piece as it is written. In `relayed`, 1 and 6 are the
# pipes of the command's output, 3 and 4 the guest's, 5 takes the exit status.
_RELAYED: Final = r"""
coded() {
  while piece=$(dd bs=65536 count=1 2>/dev/null | base64) && [ -n "$piece" ]; do say D "$piece"; done
  cat 2>/dev/null
}
relayed() {
  if [ "$({ printf a | dd bs=1 count=1 | base64; } 2>/dev/null)" != YQ== ]; then
    as_user "$1" < /dev/null
    return
  fi
  exec 3>&1 4>&2
  code=$({
    {
      { as_user "$1" < /dev/null 2>&6 3>&- 4>&- 5>&- 6>&-; echo "$?" >&5; } | coded >&3
    } 6>&1 | coded >&4
  } 5>&1)
  return "${code:-137}"
}
"""

# Tried with ids that exist everywhere. su can't give another group than the user's own.
_CAN_BECOME: Final = r"""
if by_setpriv 0 0 0 || by_chroot 0 0 0 || { %s && program su; }; then :
else die "USER: the image has no program that starts another as a user with its groups: \
install setpriv (util-linux) or chroot (coreutils)"; fi
"""

_CAN_PLACE: Final = r"""
mkdir "$S" && cd "$S" && : > a && ln -s a b || die "no directory can be made in / of the image"
touch -h -d @1 a b || die "touch of the image does not know -h and -d @SECONDS"
[ "$(stat -c %Y b)" = 1 ] || die "stat of the image does not know -c FORMAT"
sha256sum a > c && sha256sum -c c >/dev/null || die "sha256sum of the image does not know -c"
cd / && rm -rf "$S"
"""


def encode_command(command: wire.RunCommand | wire.CopyCommand) -> str:
    """Write a command as the JSON object that travels in `CommandsResponse`."""
    document: dict[str, Any] = {
        "OriginalCommand": command.original,
        "Workdir": _attribute(command.workdir),
        "User": _attribute(command.user),
    }
    if isinstance(command, wire.RunCommand):
        document |= {
            "Command": command.argv[-1],
            "Shell": {"OriginalCommand": "", "Commands": list(command.argv[:-1])},
            "Env": dict(command.env),
            "Args": dict(command.args),
        }
    else:
        document |= {
            "OriginalSource": command.source,
            "Source": command.source,
            "Stage": "",
            "Target": command.target,
            "UserFromLocalChown": None if command.chown is None else _attribute(command.chown),
        }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _attribute(value: str) -> dict[str, str]:
    return {"OriginalCommand": "", "Value": value}


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


def probe(commands: Sequence[wire.AnyCommand]) -> str:
    """Return what finds out, before the first step, whether the image has what the scripts need."""
    copies = any(isinstance(command, wire.CopyCommand) for command in commands)
    users = [command.user for command in commands if isinstance(command, wire.RunCommand)]
    others = [user.partition(":") for user in users if not is_root(user)]
    text = _tools((*_ALWAYS, *_FOR_FILES) if copies else _ALWAYS)
    text += _CAN_PLACE if copies else ""
    if others:
        text += _PROGRAMS + _CAN_BECOME % ("false" if any(group for _, _, group in others) else ":")
    return text + "say P ''\n"


def is_root(user: str) -> bool:
    """Tell whether a USER value is root by any of its names."""
    name, _, group = user.partition(":")
    return name in _ROOT and group in _ROOT


def _tools(names: Sequence[str]) -> str:
    return (
        f"missing=; for tool in {' '.join(names)}; do "
        'command -v "$tool" >/dev/null || missing="$missing $tool"; done\n'
        '[ -z "$missing" ] || die "the image lacks$missing"\n'
    )


def workdir(command: wire.WorkdirCommand) -> str:
    """Return what makes the directory for the current user."""
    path = wire.absolute("/", command.workdir)
    user = shlex.quote(command.user)
    return f'begin\nuser {user}\n! number {user} || G=$U\nmk {shlex.quote(path)} "$U:$G"\nsay E 0\n'


def run(command: wire.RunCommand, staging: str) -> str:
    """Return what executes a RUN with exactly its environment, user and directory.

    Args:
        command: the RUN.
        staging: directory that may be made for the time of the RUN.
    """
    directory, user = shlex.quote(wire.absolute("/", command.workdir)), shlex.quote(command.user)
    script = remove = ""
    argv = command.argv
    if command.script is not None:
        argv = (f"{staging}/run",)
        # Others than root have to reach it.
        script = f'mkdir -m 0711 "$S" && printf %s {shlex.quote(command.script)} > "$S/run" && '
        script += 'chmod 00755 "$S/run" || failed\n'
        remove = 'rm -rf "$S"\n'
    return (
        f"{_PROGRAMS}{_AS_USER}{_RELAYED}begin\nuser {user}\nmk {directory} 0:0\nbecome {user}\n{script}"
        f'cd {directory} || die "WORKDIR "{directory}": it can not be entered"\n'
        f"relayed {_command_line(command, argv)}\n"
        # Where the guest has closed the pipe, its own words are to come through.
        f"code=$?\ntrap '' PIPE\ncd /\n{remove}"
        f'say E "$code"\nexit "$code"\n'
    )


def _command_line(command: wire.RunCommand, argv: Sequence[str]) -> str:
    environment = {"PATH": wire.DEFAULT_PATH, **command.args, **command.env}
    assignments = [shlex.quote(f"{name}={value}") for name, value in environment.items()]
    if "HOME" not in environment:
        assignments.append('HOME="$FB_HOME"')
    return shlex.quote(" ".join(["exec env -i", *assignments, *map(shlex.quote, argv)]))
