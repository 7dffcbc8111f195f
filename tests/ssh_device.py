"""A device on this machine: a real sshd on loopback whose sessions land in an emulated board's file system.

`uname -m` says aarch64 or armv7l there and every program is run by QEMU, in a name space of users and mounts of its
own. Home and /tmp are folders of the test, which sees in them what a session leaves behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from edgecomp.targets import SUFFIX
from edgecomp.targets.cores import EMULATED, Machine
from edgecomp.targets.emulated import install

REQUIRED = "EDGECOMP_REQUIRE_DEVICES"
"""Where this is set, as in CI, what a test of devices needs must be there: it fails instead of being skipped."""

POSIX = ("sh", "mkdir", "rm", "uname", "tr", "dd", "wc", "chmod")
"""What the C runner needs of a device's programs."""

# Run by sshd for every session; $SSH_ORIGINAL_COMMAND is what the client asked for.
FORCED = """#!/bin/sh
exec unshare --user --map-root-user --mount --propagation private sh {place}/enter.sh
"""
ENTER = r"""set -e
root={root}
mount --rbind /proc $root/proc
mount --bind {place}/cpuinfo $root/proc/cpuinfo
mount --rbind /dev $root/dev
mount --bind {place}/home $root/root
mount --bind {place}/tmp $root/tmp
. {place}/extra.sh
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
magic='\x7fELF{bits}\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00{elf}\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
echo ":edgecomp:M::$magic:$mask:/usr/bin/{qemu}:F" > /proc/sys/fs/binfmt_misc/register
cd /
exec env -i "${{path:-PATH=/usr/bin}}" HOME=/root QEMU_CPU={cpu} {chroot} $root /usr/bin/sh -c "$SSH_ORIGINAL_COMMAND"
"""


ELF = {"aarch64": ("\\x02", "\\xb7"), "armv7l": ("\\x01", "\\x28")}
"""How a program of the machine is told: bytes 4 and 18 of its file."""


class Device:
    """The device, and the client's configuration for it.

    Attributes:
        place: the folder with everything; `home` and `tmp` in it are the device's.
        port: of sshd, on 127.0.0.1.
    """

    def __init__(self, place: Path, root: Path, target: str = "rpi4-emulated") -> None:
        self.place, self.root, self.port = place, root, _free_port()
        core, self.board = EMULATED[target], target.removesuffix(SUFFIX)
        for name in ("home", "tmp", "bin"):
            (place / name).mkdir()
        lines = "".join(f"{key}\t: {value}\n" for key, value in core.cpuinfo.items())
        (place / "cpuinfo").write_text("\n".join(f"processor\t: {i}\n{lines}" for i in range(4)))
        self.extra("")
        chroot = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin")
        bits, elf = ELF[core.machine.name]
        entered = ENTER.format(
            place=place, root=root, cpu=core.qemu, chroot=chroot, qemu=core.machine.qemu, bits=bits, elf=elf
        )
        (place / "enter.sh").write_text(entered)
        self.script("forced.sh", FORCED.format(place=place))
        for name in ("host", "user", "stranger", "other_host"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.copy(place / "user.pub", place / "authorized_keys")
        self.trust("host")
        self.key("user")
        # What the user's own PATH finds first as ssh, with another configuration: the product has no option for it.
        self.script("bin/ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} -F {place}/ssh_config "$@"\n')
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"ssh://127.0.0.1:{self.port}?board={self.board}"

    def script(self, name: str, text: str) -> None:
        (self.place / name).write_text(text)
        (self.place / name).chmod(0o755)

    def only(self, *programs: str, more: str = "", machine: str | None = None) -> None:
        """Leave no other programs in PATH than these; say what else is mounted, and what uname says."""
        place = self.place / "programs"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name in programs:
            (place / name).symlink_to(f"/usr/bin/{name}")
        if machine is not None:
            (place / "uname").unlink()
            self.script("programs/uname", f"#!/usr/bin/sh\necho {machine}\n")
        self.extra(f"mount --bind {place} $root/edgecomp; path=PATH=/edgecomp\n{more}")

    def extra(self, text: str) -> None:
        """Say what else is mounted or set when a session begins."""
        (self.place / "extra.sh").write_text(f"{text}\n")

    def trust(self, key: str | None) -> None:
        """Say which host key the client knows."""
        known = "" if key is None else f"[127.0.0.1]:{self.port} {(self.place / f'{key}.pub').read_text()}"
        (self.place / "known_hosts").write_text(known)

    def key(self, name: str) -> None:
        """Say which key the client logs in with."""
        config = [f"IdentityFile {self.place}/{name}", "IdentitiesOnly yes", "IdentityAgent none"]
        config += [f"UserKnownHostsFile {self.place}/known_hosts", "GlobalKnownHostsFile /dev/null"]
        (self.place / "ssh_config").write_text("\n".join(["Host *", *config, ""]))

    def start(self) -> None:
        config = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "HostKey": self.place / "host",
            "AuthorizedKeysFile": self.place / "authorized_keys",
            "ForceCommand": self.place / "forced.sh",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
        }
        (self.place / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in config.items()))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists
        sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin:/usr/local/sbin")
        assert sshd is not None
        with (self.place / "sshd.log").open("wb") as log:
            self.process = subprocess.Popen([sshd, "-D", "-e", "-f", self.place / "sshd_config"], stderr=log)
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError((self.place / "sshd.log").read_text())

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()

    def sessions(self) -> list[int]:
        """Name the processes of sshd that serve a connection."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(number) for number in children.split()]

    def left_behind(self) -> list[str]:
        """Name what lies in the device's temporary folder and in its cache, but for finished environments."""
        cache = self.place / "home" / ".cache" / "edgecomp"
        kept = [p.name for p in cache.glob("*") if not p.name.startswith(("venv-", "native-")) and p.name != "run.lock"]
        return sorted([*(p.name for p in (self.place / "tmp").iterdir()), *kept])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def missing() -> str:
    """Say what this machine lacks; nothing is good. The file system is made if it is not there."""
    tools = {"sshd": "openssh-server", "ssh": "openssh-client", "qemu-aarch64": "qemu-user", "cc": "gcc"}
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [package for tool, package in tools.items() if shutil.which(tool, path=path) is None]
    if lacking:
        return f"apt-get install {' '.join(lacking)}"
    mounts = "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounts]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return "a kernel, 6.7 or newer, that lets a name space of users have its own binary formats"
    return ""


def emulated_root(machine: Machine) -> Path:
    """Give the file system of emulated boards, where `edgecomp targets --install` puts it."""
    return install(lambda name, total: contextlib.nullcontext(lambda n: None), machine=machine)


@contextlib.contextmanager
def running(place: Path, root: Path, target: str = "rpi4-emulated") -> Iterator[Device]:
    """Give a device that is switched on."""
    device = Device(place, root, target)
    device.start()
    try:
        yield device
    finally:
        device.stop()
