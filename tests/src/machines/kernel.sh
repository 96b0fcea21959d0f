#!/bin/bash
# kernel.sh FOLDER SUITE PACKAGE: fetches a kernel of Debian's and packs it for QEMU into FOLDER:
#
#   vmlinuz      the kernel
#   initramfs    busybox, the modules of virtio and the file systems, and what mounts the root (see `init` below)
#   modules.img  all modules but those of hardware, as /lib/modules
#   release      what `uname -r` says
#   package      name and version of the package
#   made-by      the sum of this file: what another one made is made anew
#
# apt checks the suite's signature by the keys of debian-archive-keyring, and each package by the sums that are signed.
set -euo pipefail
folder=$1 suite=$2 package=$3
made_by=$(sha256sum <"$0")
[ "$(cat "$folder/made-by" 2>/dev/null)" != "$made_by" ] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "fetching Linux of $suite ($package, some 30 MB) into $folder"
fail() { echo "Linux of $suite ($package): $*" >&2; exit 1; }

# Of the mirror that this machine uses, with lists of its own: nothing is installed, and no list of this machine changes.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | grep -v security | head -1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
mkdir -p "$work/lists/partial" "$work/debs" "$work/root"
echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} $suite main" >"$work/sources.list"
options=(-q=2 -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Retries=3 -o Acquire::http::Timeout=20
    -o "Dir::State::lists=$work/lists" -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=-
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dir::State::status=/dev/null)
apt-get "${options[@]}" update 2>"$work/said" && ! grep -q '^[EW]:' "$work/said" ||
    fail "$(cat "$work/said") (are the keys of $suite in $keys? apt-get install debian-archive-keyring)"

# From a meta-package to the image that it depends on; since 7.0 an image depends on a binary, modules and a base in turn.
packages=() todo=("$package")
while [ ${#todo[@]} -gt 0 ]; do
    next=${todo[0]} todo=("${todo[@]:1}")
    [[ " ${packages[*]} " != *" $next "* ]] || continue
    apt-cache "${options[@]}" show "$next" >/dev/null 2>&1 ||
        fail "$next is not in the archive any more; name another in tests/src/machines/kernels.txt"
    packages+=("$next")
    mapfile -t -O ${#todo[@]} todo < <(apt-cache "${options[@]}" depends "$next" |
        sed -nE 's/^ *Depends: (linux-(image|binary|modules|base)-[0-9].*)/\1/p')
done
(cd "$work/debs" && apt-get "${options[@]}" download "${packages[@]}" 2>"$work/said") || fail "$(cat "$work/said")"
for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/root"; done

modules=$work/root/lib/modules
[ -d "$modules" ] || modules=$work/root/usr/lib/modules
release=$(basename "$(dirname "$(ls -d "$modules"/*/kernel)")")
tree=$work/tree
mkdir -p "$tree/lib/modules"
mv "$modules/$release" "$tree/lib/modules/"
modules=$tree/lib/modules/$release
vmlinuz=$work/root/boot/vmlinuz-$release
[ -e "$vmlinuz" ] || vmlinuz=$modules/vmlinuz
mkdir -p "$folder"
cp "$vmlinuz" "$folder/vmlinuz"
for unused in build source vmlinuz kernel/sound kernel/drivers/gpu kernel/drivers/infiniband kernel/drivers/usb; do
    rm -rf "${modules:?}/$unused"
done
PATH=$PATH:/usr/sbin:/sbin
depmod -b "$tree" "$release"

initramfs=$work/initramfs
mkdir -p "$initramfs"/{bin,first,dev,proc,sys,lower,memory,root}
cp "$(command -v busybox)" "$initramfs/bin/busybox"
first=$(for module in virtio_pci virtio_blk virtio_console virtio_net ext4 overlay; do
    modprobe -d "$tree" -S "$release" --show-depends "$module" || fail "it has no $module"
done)
number=10
for module in $(sed -n 's/^insmod \([^ ]*\).*/\1/p' <<<"$first" | awk '!seen[$0]++'); do
    name=$initramfs/first/$number-$(basename "$module")
    number=$((number + 1))
    case $module in
    *.xz) unxz -c "$module" >"${name%.xz}" ;;
    *.zst) zstd -qdc "$module" >"${name%.zst}" ;;
    *) cp "$module" "$name" ;;
    esac
done
# The root is the image of programs below a memory of changes; a disk with a system of its own takes its place.
cat >"$initramfs/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /first/*; do insmod "$module"; done
tries=0
while [ ! -e /dev/vdc ] && [ $tries -lt 200 ]; do tries=$((tries + 1)); sleep 0.05; done
if grep -qw machine.root=disk /proc/cmdline; then
    mount -t ext4 /dev/vda /root
else
    mount -t ext4 -o ro /dev/vdc /lower
    mount -t tmpfs memory /memory
    mkdir /memory/changes /memory/work
    mount -t overlay -o lowerdir=/lower,upperdir=/memory/changes,workdir=/memory/work root /root
fi
mkdir -p /root/lib/modules /root/dev /root/proc /root/sys
mount -t ext4 -o ro /dev/vdb /root/lib/modules
for kernel in dev proc sys; do mount --move /$kernel /root/$kernel; done
exec switch_root /root /sbin/init
INIT
chmod +x "$initramfs/init"
(cd "$initramfs" && find . | busybox cpio -o -H newc) >"$folder/initramfs" 2>/dev/null

size=$(($(du -sm "$tree" | cut -f1) * 5 / 4 + 16))
rm -f "$folder/modules.img"
mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$tree/lib/modules" "$folder/modules.img" "${size}M" >/dev/null
echo "$release" >"$folder/release"
dpkg-deb -W --showformat '${Package} ${Version}\n' "$work"/debs/linux-image-[0-9]*.deb | tail -1 >"$folder/package"
echo "$made_by" >"$folder/made-by"
echo "Linux $release is there after $SECONDS s"
