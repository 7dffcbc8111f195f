#!/bin/sh
# Makes ROOT, a Debian 12 for 64-bit Arm with the newest onnxruntime of runtimes.txt, for `tests.runtimes --aarch64 ROOT`.
# As root, once: sh tests/runtimes_aarch64.sh ROOT. Needs apt-get install debootstrap qemu-user-static, and pip.
set -eu
root=$1
debootstrap --foreign --arch=arm64 --variant=minbase --include=python3,libgomp1,libstdc++6 bookworm "$root"
# Taking the packages apart is enough: nothing in them has to be set up, so no emulator need be registered.
for deb in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$deb" "$root"; done
cp "$(command -v qemu-aarch64-static)" "$root/"
# QEMU 7.2 shows the host's processor where programs ask for theirs: these files say what `-cpu cortex-a76` is.
mkdir -p "$root/proc" "$root/sys/devices/system/cpu"
cat > "$root/proc/cpuinfo" <<'END'
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

END
echo 0 > "$root/sys/devices/system/cpu/possible"
echo 0 > "$root/sys/devices/system/cpu/present"
packages=$(grep '^onnxruntime-' "$(dirname "$0")/runtimes.txt" | tail -n 1 | cut -d ' ' -f 2-)
wheels=$(mktemp -d)
# shellcheck disable=SC2086
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.11 --platform manylinux_2_27_aarch64 \
  --platform manylinux_2_28_aarch64 --dest "$wheels" $packages
for wheel in "$wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$root/usr/lib/python3/dist-packages/"; done
rm -r "$wheels"
