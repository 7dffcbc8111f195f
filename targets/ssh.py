"""A session with a device by the system's own OpenSSH client: its configuration, agent, jump hosts and known hosts.

Host keys are checked as ssh is set up to; nothing is switched off, and nothing is asked: what needs an answer fails.
What a device says is data: lines of JSON with a limit, read strictly.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from edgecomp.errors import PlanError, TargetError, UsageError
from edgecomp.strictjson import load_strict_json

SCHEME = "ssh://"
CONNECT_S = 15
"""Seconds for a connection; ssh itself gives up on one that has been silent for four times this."""
FIRST_ANSWER_S = 60.0
"""Seconds until the device's python3 has said what it is."""
NO_PROGRAM = 127
"""What ssh ends with where the program that should begin a session is not there."""
MOST_BYTES = 64 * 2**20
"""That a device may answer at once."""
_LINE_BYTES = 64 * 1024
_CHUNK = 1 << 16
# Read the program's length, then the program, from standard input, and leave the rest of it to the program.
PYTHON = (
    "python3 -c 'import os,sys;d=b\"\"\nwhile d[-1:]!=b\"\\n\":\n c=os.read(0,1)\n if not c: sys.exit(3)\n d+=c\n"
    "n=int(d);p=b\"\"\nwhile len(p)<n:\n c=os.read(0,n-len(p))\n if not c: sys.exit(3)\n p+=c\n"
    "exec(compile(p,\"session\",\"exec\"))'"
)
"""Begins a session with a program in Python."""
# It makes the session's folder, says what the device is, reads a program's length and the program, which then goes on;
# the folder is removed by whoever of the two ends the session. Nothing is used that POSIX does not know of.
SHELL = r"""exec sh -c '
umask 077
d=${TMPDIR:-/tmp}/edgecomp-$$
fail() {
  printf "{\"error\": \"%s\", \"bytes\": 0}\n" "$(printf %s "$1" | tr "\012\042\134" " __" | tr -cd "[:print:]")"
  exit 1
}
mkdir "$d" || fail "no folder can be made in ${TMPDIR:-/tmp}"
trap "rm -rf \"$d\"" EXIT
trap "exit 1" HUP INT TERM PIPE
loaders=
for f in /lib/ld-linux*.so.* /lib64/ld-linux*.so.*; do
  if [ -e "$f" ]; then loaders="$loaders $f"; fi
done
printf "{\"machine\": \"%s\", \"loaders\": \"%s\", \"bytes\": 0}\n" "$(uname -m)" "$loaders"
read -r n || exit 1
said=$(dd bs=1 count="$n" of="$d/runner" 2>&1) || fail "$said"
[ "$(wc -c < "$d/runner")" -eq "$n" ] || exit 1
chmod 700 "$d/runner"
said=$("$d/runner" --help 2>&1) || fail "it does not start: $said"
trap - EXIT HUP INT TERM PIPE
exec "$d/runner" --task=session --folder="$d"
'"""
"""Begins a session with a compiled program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A device.

    Attributes:
        host: as ssh takes it, with user@ or without.
        port: None for ssh's own choice.
        board: what stands in reports: a name of `edgecomp targets`, or the host.
        known: whether `board` is one.
    """

    host: str
    port: int | None
    board: str
    known: bool


def parse_address(text: str) -> Address:
    """Read ssh://[user@]host[:port][?board=NAME].

    Raises:
        UsageError: it is something else.
    """
    form = "expected ssh://[user@]host[:port][?board=NAME]"
    try:
        url = urlsplit(text)
        port, host, user = url.port, url.hostname, url.username
        query = dict(parse_qsl(url.query, strict_parsing=True)) if url.query else {}
    except ValueError as e:
        raise UsageError(f"target {text!r:.120}: {e}; {form}") from e
    plain = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    legal = bool(re.fullmatch(plain, host or "")) or ":" in (host or "")
    if url.scheme != "ssh" or not legal or url.password or url.path not in ("", "/") or url.fragment:
        raise UsageError(f"target {text!r:.120}: {form}")
    if user is not None and not re.fullmatch(plain, user):
        raise UsageError(f"target {text!r:.120}: user {user!r:.40}; {form}")
    if query.keys() - {"board"}:
        raise UsageError(f"target {text!r:.120}: after ? there may be board=NAME alone; {form}")
    # urlsplit makes the host small letters, an alias in ssh's configuration may have others.
    name = re.search(re.escape(host or ""), text, flags=re.IGNORECASE)
    whole = name.group() if name else str(host)
    at = whole if user is None else f"{user}@{whole}"
    return Address(host=at, port=port, board=query.get("board") or whole, known="board" in query)


class Session:
    """A program on a device that answers one message after the other.

    See `benchmarks.session` for the side of a program in Python, and edgecomp_session.c for that of one in C.

    Attributes:
        facts: what the program said of the device when it began.
        code: of ssh, when the connection has ended by itself.
    """

    def __init__(self, address: Address, begin: str = PYTHON) -> None:
        """Begin to connect.

        Args:
            address: the device.
            begin: what runs there first, PYTHON or SHELL.

        Raises:
            TargetError: ssh is missing.
        """
        if shutil.which("ssh") is None:
            raise TargetError("ssh not found; install OpenSSH's client: apt-get install openssh-client")
        self._address, self._begin, self._buffer = address, begin, b""
        self.facts: dict[str, Any] = {}
        self.code: int | None = None
        options = {"BatchMode": "yes", "ConnectTimeout": CONNECT_S, "ServerAliveInterval": CONNECT_S}
        options["ServerAliveCountMax"] = 4
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        port = [] if address.port is None else ["-p", str(address.port)]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        # A session of its own: Ctrl-C is for this process, which then ends the connection in its own way.
        self._process = subprocess.Popen(
            ["ssh", "-T", *words, *port, "--", address.host, begin],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            start_new_session=True,
        )

    def hear(self) -> dict[str, Any]:
        """Wait for what the device says unasked.

        Raises:
            TargetError: the device cannot be reached or is not who it was, or it has no program to begin with.
        """
        said, _ = self._answer(FIRST_ANSWER_S)
        return said

    def start(self, program: bytes) -> None:
        """Start the program, which begins by saying what the device is (`facts`).

        Raises:
            TargetError: the device cannot be reached or is not who it was, or it has no python3.
        """
        self._send(b"%d\n" % len(program) + program, FIRST_ANSWER_S)
        self.facts = self.hear()

    def end(self) -> None:
        """End the connection at once, from any thread; whoever waits for an answer is told that it is gone."""
        self._process.terminate()

    def ask(
        self, message: Mapping[str, object], files: Mapping[str, bytes] | None = None, *, limit_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """Send a message with files, and wait for the answer and what stands behind it.

        Raises:
            TargetError: the device says what is wrong, is silent for too long, or is gone.
        """
        files = files or {}
        head = {**message, "files": [[name, len(data)] for name, data in files.items()], "limit_s": limit_s}
        self._send(json.dumps(head).encode() + b"\n" + b"".join(files.values()), limit_s)
        return self._answer(limit_s + FIRST_ANSWER_S)

    def order(
        self, words: Sequence[object], files: Mapping[str, bytes], arguments: Sequence[str], *, limit_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """Do the same to a program in C: lines of words, one for each file and argument.

        Raises:
            TargetError: as `ask`; or an argument has more than one line.
        """
        lines = [" ".join(map(str, words)), *(f"{len(data)} {name}" for name, data in files.items()), *arguments]
        if any("\n" in line for line in lines):
            raise TargetError(f"{self._address.host}: an argument of two lines cannot be sent: {lines!r:.200}")
        self._send("".join(f"{line}\n" for line in lines).encode() + b"".join(files.values()), limit_s)
        return self._answer(limit_s + FIRST_ANSWER_S)

    def close(self) -> None:
        """End the session; the device removes what it was sent."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, data: bytes, limit_s: float) -> None:
        assert self._process.stdin is not None
        deadline, rest = time.monotonic() + limit_s + len(data) / 50_000, memoryview(data)
        while rest:
            _, ready, _ = select.select([], [self._process.stdin], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TargetError(f"{self._address.host}: takes no data; the connection is too slow or gone")
            try:
                rest = rest[self._process.stdin.write(rest[:_CHUNK]) or 0 :]
            except OSError:
                return  # the other end has closed; its last word, if there is one, says why

    def _more(self, deadline: float) -> None:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TargetError(f"{self._address.host}: no answer in time; is it overloaded?")
        part = self._process.stdout.read(_CHUNK)
        if not part:
            raise self._gone()
        self._buffer += part

    def _answer(self, limit_s: float) -> tuple[dict[str, Any], bytes]:
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            if len(self._buffer) > _LINE_BYTES:
                raise TargetError(f"{self._address.host}: a line of more than {_LINE_BYTES} bytes; expected JSON")
            self._more(deadline)
        line, self._buffer = self._buffer.split(b"\n", 1)
        where = f"{self._address.host}: answer"
        try:
            found = dict(load_strict_json(line.decode("utf-8"), where))
            n = found.pop("bytes")
        except (PlanError, UnicodeDecodeError, KeyError) as e:
            said = line[:80].decode("utf-8", "replace")
            raise TargetError(f"{where}: {said!r} is no line of JSON; does its shell print something at login?") from e
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= MOST_BYTES:
            raise TargetError(f"{where}: {n!r:.40} bytes, expected up to {MOST_BYTES}")
        while len(self._buffer) < n:
            self._more(deadline)
        data, self._buffer = self._buffer[:n], self._buffer[n:]
        if "error" in found:
            raise TargetError(f"{self._address.host}: {' '.join(str(found['error']).split())[:300]}")
        return found, data

    def _gone(self) -> TargetError:
        """Say why the connection ended, from what ssh said."""
        try:
            code = self.code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = None
        self._stderr.seek(0)
        said = self._stderr.read(1 << 16).decode("utf-8", "replace")
        host = self._address.host
        for sign, meaning in _SIGNS:
            if re.search(sign, said):
                return TargetError(f"{host}: {meaning.format(host=host)}")
        if code == NO_PROGRAM and self._begin == SHELL:
            return TargetError(f"{host}: has not all programs of a POSIX system")
        if code == NO_PROGRAM:
            return TargetError(f"{host}: has no python3 (there: apt-get install python3)")
        lines = [line for line in said.splitlines() if line.strip()] or [f"ssh ended with {code}"]
        return TargetError(f"{host}: the connection ended: {lines[-1][:300]}")


_SIGNS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host key is not the one that is known; if the device was set up anew, remove the old key with "
        "ssh-keygen -R, connect once with: ssh {host}",
    ),
    (
        "Host key verification failed|No .* host key is known",
        "the host key is not known yet; connect once with: ssh {host}, and compare the fingerprint",
    ),
    ("Permission denied", "login refused; is the key on the device and in the agent? Try: ssh {host}"),
    ("[Cc]onnection refused", "connection refused; does sshd run there, on this port?"),
    ("timed out|No route to host|Could not resolve|Name or service not known", "cannot be reached; try: ssh {host}"),
)


def platforms_of(machine: str, libc: str) -> tuple[str, ...]:
    """Name the platforms whose wheels run on a machine with glibc, newest first.

    Raises:
        TargetError: the C library is another one.
    """
    found = re.fullmatch(r"2\.(\d+)(\.\d+)?", libc)
    if found is None:
        raise TargetError(f"the device's C library says {libc!r:.40}; expected glibc, for which there are wheels")
    minor = int(found.group(1))
    return (*(f"manylinux_2_{n}_{machine}" for n in range(minor, 16, -1)), f"manylinux2014_{machine}")


def read_wheels(paths: Sequence[Path]) -> dict[str, bytes]:
    """Read wheels by name."""
    return {path.name: path.read_bytes() for path in paths}
