"""The device's end of a session over SSH: sent there as text and run by its python3, with nothing but its own library.

Both ends take turns. The device speaks first; every message is a line of JSON, some have bytes behind them. Files lie
in a private temporary folder, which is removed however the session ends: by a last word, by a signal, by a time limit,
or by a lost connection, which is noticed because standard input ends. What stays is an environment for each set of
wheels, in the user's cache folder.
"""

import contextlib
import fcntl
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

CHUNK = 1 << 16
CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "edgecomp")


# Prints those of its arguments that are not installed, or whose version is not below what stands behind "<".
LACKING = """
import importlib.metadata, sys
for package in sys.argv[1:]:
    name, _, below = package.partition("<")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or below and int(version.split(".")[0]) >= int(below):
        print(package)
"""


class Gone(Exception):
    """Nobody is at the other end any more."""


def read_exactly(n):
    """Take n bytes from standard input, unbuffered, so that `select` tells the truth about what is left."""
    parts = []
    while n:
        part = os.read(0, min(n, CHUNK))
        if not part:
            raise Gone
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def read_message():
    """Take a line of JSON."""
    line = b""
    while not line.endswith(b"\n"):
        line += read_exactly(1)
    return json.loads(line.decode("utf-8"))


def answer(message, data=b""):
    """Send a line of JSON, and bytes behind it."""
    text = json.dumps({**message, "bytes": len(data)}) + "\n"
    rest = memoryview(text.encode("utf-8") + data)
    while rest:
        rest = rest[os.write(1, rest) :]


def take_files(folder, files):
    """Write the files that follow a message; all are taken off the wire even if the disk is full."""
    trouble = None
    for name, size in files:
        try:
            out = open(os.path.join(folder, os.path.basename(name)), "wb")  # noqa: SIM115
        except OSError as e:
            out, trouble = None, trouble or e
        while size:
            part = read_exactly(min(size, CHUNK))
            size -= len(part)
            try:
                if out and not trouble:
                    out.write(part)
                    out.flush()
            except OSError as e:
                trouble = e
        try:
            if out:
                out.close()
        except OSError as e:
            trouble = trouble or e
    if trouble:
        raise trouble


def environment(key):
    """Give the place of an environment."""
    return os.path.join(CACHE, "venv-" + os.path.basename(key))


def make_environment(message, work):
    """Make an environment of wheels, at once or not at all; another session may have been quicker."""
    take_files(work, message["files"])
    place = environment(message["key"])
    if os.path.exists(os.path.join(place, "ready")):
        return
    os.makedirs(CACHE, exist_ok=True)
    made = tempfile.mkdtemp(prefix="making-", dir=CACHE)
    try:
        # Its own packages it shows the environment only if one of them is needed.
        venv = [sys.executable, "-m", "venv"] + (["--system-site-packages"] if message["own"] else [])
        run_quietly([*venv, "--without-pip", made], message["limit_s"])
        version = "python{}.{}".format(*sys.version_info)
        for name, _ in message["files"]:
            with zipfile.ZipFile(os.path.join(work, name)) as wheel:
                wheel.extractall(os.path.join(made, "lib", version, "site-packages"))
            os.unlink(os.path.join(work, name))
        if message["own"]:
            see_to(message["own"], [*venv, made], os.path.join(made, "bin", "python"), message["limit_s"])
        with open(os.path.join(made, "ready"), "w") as ready:
            ready.write("\n".join(message["packages"]))
        # Programs of the environment are not used but its python, so that it may be renamed.
        try:
            os.rename(made, place)
        except OSError:
            if not os.path.exists(os.path.join(place, "ready")):
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def see_to(packages, venv, python, limit_s):
    """See to it that an environment has packages of which no wheel was sent: the device's own, or by its pip."""
    code, out, _ = run_watched([python, "-s", "-c", LACKING, *packages], limit_s, {})
    lacking = packages if code else out.decode("utf-8", "replace").split()
    if not lacking:
        return
    try:
        run_quietly(venv, limit_s)
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
        run_quietly([*install, *lacking], limit_s)
    except OSError as e:
        hint = "; there: apt-get install python3-numpy" if any(name.startswith("numpy") for name in lacking) else ""
        raise OSError("has no {} and cannot install it: {}{}".format(", ".join(lacking), e, hint)) from e


def run_quietly(command, limit_s):
    """Run a program to its end; what it says last is the error."""
    code, _, said = run_watched(command, limit_s, {})
    if code:
        lines = said.strip().splitlines() or ["no message"]
        raise OSError(f"{' '.join(command[:4])} ended with {code}: {lines[-1][:300]}")


def run_watched(command, limit_s, env):
    """Run a program until it ends, the time is over or nobody waits for it; nothing of it is left behind."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True, env={**os.environ, **env}
        )
        deadline = time.monotonic() + limit_s
        try:
            while child.poll() is None:
                watch()
                if time.monotonic() > deadline:
                    raise OSError(f"not done after {limit_s} s")
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(0)
        err.seek(0)
        return child.returncode, out.read(), err.read(1 << 20).decode("utf-8", "replace")


def watch():
    """Wait a moment, and notice if the other end is gone."""
    ready, _, _ = select.select([0], [], [], 0.1)
    if ready and not os.read(0, 1):
        raise Gone


def run(message, work):
    """Run the runner, alone on this device."""
    take_files(work, message["files"])
    os.makedirs(CACHE, exist_ok=True)
    python = os.path.join(environment(message["key"]), "bin", "python")
    deadline = time.monotonic() + message["limit_s"]
    with open(os.path.join(CACHE, "run.lock"), "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # Two at once would measure each other.
                if time.monotonic() > deadline:
                    raise OSError("another measurement holds this device for longer than the time limit") from None
                watch()
        words = [word.replace("@", work + os.sep, 1) if word.startswith("@") else word for word in message["argv"]]
        words = [word.replace("=@", "=" + work + os.sep, 1) for word in words]
        command = [python, "-s", "-B", *words]
        # onnxruntime's telemetry is a thread and a data base of its own: neither belongs into a measurement.
        code, out, err = run_watched(command, message["limit_s"], {"TMPDIR": work, "ORT_DISABLE_TELEMETRY": "1"})
    answer({"exit": code, "stderr": err[-4000:]}, out)


def machine():
    """Say for which machine a wheel must be: a 64-bit kernel may have a system of 32 bits on it, as Pi OS does."""
    name = platform.machine()
    return "armv7l" if name in ("aarch64", "armv8l") and sys.maxsize < 1 << 32 else name


def facts():
    """Say what is to know before anything is sent."""
    at = CACHE
    while not os.path.isdir(at):
        at = os.path.dirname(at)
    found = os.listdir(CACHE) if os.path.isdir(CACHE) else []
    ready = [name for name in found if os.path.exists(os.path.join(CACHE, name, "ready"))]
    return {
        "session": 1,
        "machine": machine(),
        "python": "{}.{}".format(*sys.version_info),
        "libc": platform.libc_ver()[1],
        "free_bytes": shutil.disk_usage(at).free,
        "environments": [name[len("venv-") :] for name in ready if name.startswith("venv-")],
    }


def stop(number, frame):
    """End as if the other end were gone."""
    raise Gone


def main():
    """Speak with the other end until it has no more to say."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, stop)
    work = None
    try:
        try:
            work = tempfile.mkdtemp(prefix="edgecomp-")
        except OSError as e:
            answer({"error": str(e)})
            return
        answer(facts())
        while True:
            message = read_message()
            try:
                if message["op"] == "environment":
                    make_environment(message, work)
                    answer({"done": True})
                elif message["op"] == "run":
                    run(message, work)
                else:
                    return
            except (OSError, subprocess.SubprocessError, zipfile.BadZipFile) as e:
                answer({"error": str(e)[:1000]})
    except (Gone, KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        if work:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
