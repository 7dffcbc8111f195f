"""Raspberry Pi-class boards in QEMU's user mode: a root file system for 64-bit Arm, one for 32-bit, run as some core.

Debian packages and wheels, both by name, are unpacked into a folder of the cache, and QEMU runs programs of it with the
core's instructions alone. What comes out is what the core would compute; how long it would take does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path

from edgecomp.errors import TargetError, UsageError
from edgecomp.files import MANIFEST, new_folder, write_file

from .cores import AARCH64, EMULATED, Core, Machine

Stage = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Opens a progress bar: its name and total give what advances it."""

SCHEMA = "edgecomp-rootfs/1"

CLASSES = (
    "integer", "branch", "load", "store", "simd_load", "simd_store", "simd_integer", "dot_product", "float", "other",
)  # fmt: skip
"""Classes of instructions, in the order in which edgecomp_count.c writes their counts."""

_TOOLS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "cc": "gcc libc6-dev",
    "ldd": "libc-bin",
    "unshare": "util-linux",
    "setarch": "util-linux",
    "chroot": "coreutils",
    "mount": "mount",
}
"""Programs that are needed here beside the emulator, and the Debian packages that hold them."""

WORK = "/edgecomp"
"""Where a run's files lie inside."""
COUNTS = "counts.txt"
_LEAST_BYTES = 10_000_000
"""With less left on the disk, what fails while installing fails for that."""
_PLUGIN = "usr/lib/edgecomp_count.so"
_LOADER = "/lib64/ld-linux-x86-64.so.2"
_SPACE = "0x1000000000"
"""Addresses of a 64-bit program, in bytes; without a limit QEMU gives it what is free."""


def cache_folder() -> Path:
    """Give the folder where installed things lie: $XDG_CACHE_HOME/edgecomp, by default ~/.cache/edgecomp."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "edgecomp"


def wanted_wheels(machine: Machine = AARCH64) -> tuple[str, ...]:
    """Name the wheels: in the versions that run on this machine, so that outputs can be compared; else the newest."""
    found = []
    for name in machine.wheels:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
    return tuple(found)


def is_installed(cache: Path | None = None, machine: Machine = AARCH64) -> bool:
    """Tell whether the root file system is there, whole, and of this edgecomp and these versions of the wheels."""
    try:
        found = json.loads((root_folder(cache, machine) / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found == _manifest(machine))


def root_folder(cache: Path | None = None, machine: Machine = AARCH64) -> Path:
    """Give the place of the root file system."""
    return (cache_folder() if cache is None else cache) / f"{machine.name}-root"


def _manifest(machine: Machine) -> dict[str, object]:
    source = resources.files(__package__).joinpath("edgecomp_count.c").read_bytes()
    return {
        "schema": SCHEMA,
        "debian": list(machine.packages),
        "wheels": list(wanted_wheels(machine)),
        "plugin_sha256": hashlib.sha256(source).hexdigest(),
    }


# ---- making it -------------------------------------------------------------------------------------------------------


def install(stage: Stage, cache: Path | None = None, machine: Machine = AARCH64) -> Path:
    """Make the root file system, unless it is there; what was downloaded stays, for a run that goes on from it.

    Args:
        stage: shows how far the work is.
        cache: where it lies; `cache_folder()` by default.
        machine: what it is for.

    Returns:
        the root file system.

    Raises:
        TargetError: this machine cannot, a tool is missing, or a package cannot be had.
        UsageError: the cache cannot be written, or is full.
    """
    _check_tools(machine)
    cache = cache_folder() if cache is None else cache
    downloads = cache / "downloads"
    try:
        return _install(stage, cache, machine)
    except (OSError, TargetError) as e:
        stays = f"what was downloaded stays in {downloads}, for the next try" if downloads.exists() else "nothing stays"
        if isinstance(e, OSError):
            raise UsageError(f"{e.filename or cache}: {e.strerror or e}; {stays}") from e
        # On a full disk apt has other things to say, and names a package.
        free = shutil.disk_usage(cache).free if cache.exists() else _LEAST_BYTES
        if free < _LEAST_BYTES:
            raise UsageError(f"{cache}: only {free / 1e6:.1f} MB are free there; {stays} ({e})") from e
        raise


def _install(stage: Stage, cache: Path, machine: Machine) -> Path:
    root, downloads = root_folder(cache, machine), cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with (cache / "install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two at once the second waits, and finds it done
        if is_installed(cache, machine):
            return root
        with stage(f"installing {machine.name}", 100) as advance, new_folder(root, force=True) as work:
            packages = _debian_packages(downloads / "apt", machine, advance)
            for folder in ("bin", "lib", "sbin"):
                (work / "usr" / folder).mkdir(parents=True)
                (work / folder).symlink_to(f"usr/{folder}")
            for folder in ("proc", "sys/devices/system/cpu", "dev", "tmp", "root", "edgecomp"):
                (work / folder).mkdir(parents=True)
            for i, package in enumerate(packages):
                _unpack_package(package, work)
                advance(_share(i, len(packages), 35))
            # As the packages' scripts would, which do not run: of several libraries Debian lets one choose.
            for library in (work / "usr/lib").glob("*/*/lib*.so.3"):
                if library.parent.name in ("blas", "lapack"):
                    (library.parents[1] / library.name).symlink_to(f"{library.parent.name}/{library.name}")
            python = _python_version(work)
            wheels = pip_download(wanted_wheels(machine), downloads / "wheels", python, machine.platforms)
            advance(20)
            for i, wheel in enumerate(wheels):
                _run([sys.executable, "-m", "zipfile", "-e", wheel, work / "usr/lib/python3/dist-packages"])
                advance(_share(i, len(wheels), 12))
            _add_emulator(work, machine)
            _add_plugin(work)
            # Four cores, as each of the boards has; programs look here, too.
            for name in ("possible", "present"):
                (work / "sys/devices/system/cpu" / name).write_text("0-3\n")
            advance(3)
            _check_imports(work, machine)
            advance(5)
            write_file(work / MANIFEST, json.dumps(_manifest(machine), indent=1).encode())
    return root


def _share(i: int, n: int, total: int) -> int:
    return total * (i + 1) // n - total * i // n


def _check_tools(machine: Machine) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise TargetError(f"emulated boards run on Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    path = os.pathsep.join((os.defpath, "/usr/sbin", "/sbin", os.environ.get("PATH", "")))
    tools = {machine.qemu: "qemu-user", **_TOOLS}
    missing = [tool for tool in tools if shutil.which(tool, path=path) is None]
    if missing:
        packages = sorted({name for tool in missing for name in tools[tool].split()})
        raise TargetError(f"{', '.join(missing)} not found; install: apt-get install {' '.join(packages)}")


def _run(
    command: Sequence[object], *, env: Mapping[str, str] | None = None, what: str = "", limit_s: float = 900
) -> str:
    """Run a program of this machine, and give its standard output.

    Raises:
        TargetError: it fails; the message has its last line.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=limit_s,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise TargetError(f"{what or words[0]}: {e}") from e
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no message"]
        said = next((line for line in lines if line.startswith(("E:", "ERROR:"))), lines[-1])
        raise TargetError(f"{what or words[0]}: ended with {done.returncode}: {said[:300]}")
    return done.stdout


def _debian_packages(folder: Path, machine: Machine, advance: Callable[[int], object]) -> list[Path]:
    """Download the packages with what they depend on, from the sources that this machine's apt is set up with."""
    for name in ("lists/partial", "archives/partial", "state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    status = folder / "status"  # of a machine that has nothing installed
    write_file(status, b"")
    settings = {
        "Dir::State": folder / "state",
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": status,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Architecture": machine.debian,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    lines = [f'{key} "{value}";' for key, value in settings.items()]
    config = folder / "apt.conf"
    write_file(config, "\n".join([*lines, f'APT::Architectures {{ "{machine.debian}"; }};', ""]).encode())
    env = {"APT_CONFIG": str(config)}
    trouble = None
    try:
        _run(["apt-get", "-q", "update"], env=env, what=f"apt-get update, {machine.debian}")
    except TargetError as e:
        trouble = e  # of one list, as while a mirror changes: the others may hold all that is needed
    advance(10)
    install = ["apt-get", "-q", "-y", "install"]
    what = f"Debian packages for {machine.debian}"
    try:
        simulated = _run([*install, "--simulate", *machine.packages], env=env, what=what)
        _run([*install, "--download-only", *machine.packages], env=env, what=what)
    except TargetError as e:
        raise trouble or e from e
    advance(15)
    chosen = re.findall(r"^Inst (\S+) \((\S+) .*\[(\w+)\]", simulated, flags=re.MULTILINE)
    found = [folder / "archives" / f"{name}_{version.replace(':', '%3a')}_{arch}.deb" for name, version, arch in chosen]
    if absent := [path.name for path in found if not path.is_file()]:
        raise TargetError(f"apt-get did not download {absent[0]}; delete {folder} and try again")
    return found


def _unpack_package(package: Path, root: Path) -> None:
    # dpkg-deb -x would put a folder in the place of the link /lib.
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as taking_apart:
        left_out = [f"--exclude=./usr/share/{name}" for name in ("doc", "man", "locale", "info", "lintian")]
        command = ["tar", "-x", "-f", "-", "-C", root, "--keep-directory-symlink", "--no-same-owner", *left_out]
        done = subprocess.run(command, stdin=taking_apart.stdout, capture_output=True, text=True, check=False)
    if done.returncode or taking_apart.returncode:
        raise TargetError(f"{package}: cannot be unpacked: {done.stderr.strip()[-200:]}; delete it and try again")


def _python_version(root: Path) -> str:
    found = sorted(path.name.removeprefix("python") for path in (root / "usr/bin").glob("python3.[0-9]*"))
    if not found:
        raise TargetError("the Debian packages hold no python3.N; expected one")
    return found[0]


def pip_download(packages: Sequence[str], folder: Path, python: str, platforms: Sequence[str]) -> list[Path]:
    """Download wheels for another machine, without dependencies.

    Raises:
        TargetError: pip is missing here, or there is no such wheel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tags = [word for name in platforms for word in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--python-version", python, *tags, "--dest", folder, *packages]
    said = _run(command, what=f"wheels {', '.join(packages)} for Python {python}")
    # "Saved ./x.whl" of a new one, "File was already downloaded /x.whl" of an old one.
    names = re.findall(r"(?:Saved|File was already downloaded) (\S+\.whl)", said)
    if len(names) != len(packages):
        raise TargetError(f"pip downloaded {len(names)} wheels, expected {len(packages)}: {', '.join(packages)}")
    return [folder / Path(name).name for name in names]


def _add_emulator(root: Path, machine: Machine) -> None:
    """Copy QEMU with its libraries, which lie where Arm has none: inside nothing else is of this machine."""
    qemu = Path(shutil.which(machine.qemu) or machine.qemu).resolve()
    listed = _run(["ldd", qemu], what=f"{machine.qemu}, which must be the dynamic one of Debian's qemu-user")
    files = re.findall(r"(?:=> )?(/\S+) \(0x", listed)
    for name in files:
        place = root / name.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name, place)  # follows links
        place.chmod(0o755)
    shutil.copyfile(qemu, root / "usr/bin" / machine.qemu)
    (root / "usr/bin" / machine.qemu).chmod(0o755)


def _add_plugin(root: Path) -> None:
    """Compile what counts instructions."""
    with resources.as_file(resources.files(__package__).joinpath("edgecomp_count.c")) as source:
        flags = ["-std=gnu99", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
        _run(["cc", *flags, "-o", root / _PLUGIN, source], what="compiling the QEMU plugin")


def _check_imports(root: Path, machine: Machine) -> None:
    """Import what is to run there, which also leaves it compiled."""
    with _temporary(root) as work:
        # Beside the runtimes, what the runner imports of Python's own: later runs leave nothing behind.
        own = "argparse, dataclasses, email, importlib.metadata, importlib.resources, json, subprocess, zipfile"
        code = f"import {', '.join(machine.modules)}, platform, {own}; print(platform.machine())"
        core = next(core for core in EMULATED.values() if core.machine is machine)
        command = inside(root, core, work, ["/usr/bin/python3", "-c", code])
        said = _run(command, what="the new root file system", limit_s=300)
    if said.strip() != machine.name:
        raise TargetError(f"the new root file system says it is {said.strip()!r:.80}, expected {machine.name}")


@contextlib.contextmanager
def _temporary(root: Path) -> Iterator[Path]:
    folder = root.with_name(f"{root.name}-work-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- running in it ---------------------------------------------------------------------------------------------------

# $1 the root, $2 the file in the place of /proc/cpuinfo, $3 the run's folder; then the command.
_ENTER = """set -e
ulimit -S -s 8192 || :
root=$1; cpuinfo=$2; work=$3; shift 3
mount --rbind /proc "$root/proc"
mount --bind "$cpuinfo" "$root/proc/cpuinfo"
mount --rbind /dev "$root/dev"
mount --bind "$work" "$root/edgecomp"
cd /
exec "$@"
"""


def inside(root: Path, core: Core, work: Path, command: Sequence[str], *, count: bool = False) -> list[str]:
    """Give the command that runs another one in the root file system, as that core, with nothing left to chance.

    Addresses, the seed of Python's hashes, the environment and the process number are fixed, and there is one thread;
    when counting also what getrandom() and the clocks give. So a program does the same steps in every run.

    Args:
        root: see `install`.
        core: one of EMULATED.
        work: a folder that is seen as WORK inside.
        command: of the root file system, its program with its whole path.
        count: write instruction counts to COUNTS in `work`.
    """
    cpuinfo = work / "cpuinfo"
    lines = "".join(f"{key}\t: {value}\n" for key, value in core.cpuinfo.items())
    cpuinfo.write_text("\n".join(f"processor\t: {i}\n{lines}" for i in range(4)))
    env = {"PATH": "/usr/bin", "HOME": "/root", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    # Its thread would be counted too, and the data base it keeps grows from run to run.
    env["ORT_DISABLE_TELEMETRY"] = "1"
    qemu = [f"/usr/bin/{core.machine.qemu}", "-cpu", core.qemu, "-seed", "1"]
    if count:
        space = ["-R", _SPACE] if core.machine is AARCH64 else []
        # Preloaded by QEMU's own loader, as it also answers the program's getrandom().
        qemu = [_LOADER, "--preload", f"/{_PLUGIN}", *qemu, *space, "-plugin", f"/{_PLUGIN},out={WORK}/{COUNTS}"]
    private = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    if os.geteuid():
        private += ["--user", "--map-root-user"]
    entered = ["sh", "-c", _ENTER, "sh", str(root), str(cpuinfo), str(work)]
    fixed = ["env", "-i", *(f"{key}={value}" for key, value in env.items())]
    return [*private, *entered, "setarch", platform.machine(), "-R", *fixed, *_chroot(root), *qemu, *command]


def _chroot(root: Path) -> list[str]:
    # env -i has emptied PATH of what this machine has in sbin.
    return [shutil.which("chroot", path=f"{os.defpath}:/usr/sbin:/sbin") or "chroot", str(root)]


def read_counts(path: Path) -> list[dict[str, int]]:
    """Read what the plugin wrote: counts by class, at each mark and at the end.

    Raises:
        TargetError: the file is missing or something else.
    """
    try:
        rows = [[int(word) for word in line.split()] for line in path.read_text("ascii").splitlines()]
    except (OSError, ValueError) as e:
        raise TargetError(f"{path.name}: no counts of instructions: {e}; is this QEMU built without plugins?") from e
    if not rows or any(len(row) != len(CLASSES) for row in rows):
        raise TargetError(f"{path.name}: expected lines of {len(CLASSES)} counts")
    return [dict(zip(CLASSES, row, strict=True)) for row in rows]
