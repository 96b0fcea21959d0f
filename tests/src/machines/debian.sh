#!/bin/bash
# debian.sh FOLDER: makes a Debian bookworm with systemd, once, into FOLDER:
#
#   root.img   an ext4 file system; machines only read it, each writes to a disk of its own over it
#   made-by    the sum of what it is made by: what another one made is made anew
#
# By mmdebstrap: apt checks the suite's signature by the keys of debian-archive-keyring, and each package by the sums that
# are signed. containerd and its plugins are installed already, since an emulated processor unpacks them for minutes; etcd is
# in a repository in the image, unpacked as well, since machines have no way to Debian's.
set -euo pipefail
folder=$1 here=$(dirname "$(realpath "$0")")
made_by=$(cat "$0" "$here/agent.sh" | sha256sum)
[ "$(cat "$folder/made-by" 2>/dev/null)" != "$made_by" ] || exit 0

echo "fetching a Debian bookworm (some 150 MB) into $folder"
PATH=$PATH:/usr/sbin:/sbin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | grep -v security | head -1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
packages=systemd-sysv,udev,dbus,iproute2,iputils-ping,nftables,kmod,procps,ca-certificates,netbase,busybox-static
packages+=,containerd,containernetworking-plugins
mmdebstrap --quiet --variant=minbase --include=$packages \
    --aptopt='Acquire::Retries "3"' --aptopt='Acquire::http::Timeout "20"' \
    --customize-hook='chroot "$1" apt-get -q=2 clean' \
    --customize-hook='chroot "$1" apt-get -q=2 install --download-only etcd-server' \
    --customize-hook='mkdir "$1/debs" && mv "$1"/var/cache/apt/archives/*.deb "$1/debs/"' \
    bookworm "$root" "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} bookworm main" >&2

mkdir "$root/srv/debian"
for deb in "$root"/debs/*.deb; do
    dpkg-deb --raw-extract "$deb" "$work/package"
    dpkg-deb --root-owner-group -Znone --build "$work/package" "$root/srv/debian/${deb##*/}" >/dev/null
    rm -rf "$work/package"
done
rm -rf "$root/debs"
(cd "$root/srv/debian" && dpkg-scanpackages --multiversion . >Packages 2>/dev/null)
echo 'deb [trusted=yes] file:/srv/debian ./' >"$root/etc/apt/sources.list"
rm -rf "$root"/var/lib/apt/lists/*
: >"$root/etc/machine-id" # each machine makes its own at its first boot
printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
: >"$root/etc/resolv.conf" # this machine's
# systemd gives a device 90 s to be seen by udev; beside others an emulated processor takes longer.
echo '/dev/vdc /media ext4 ro,x-systemd.device-timeout=10min 0 0' >"$root/etc/fstab"

# eth0 is Vagrant's NAT. What Vagrant adds to a machine, eth1 and the host name, comes later, as it does there.
printf '[Match]\nName=eth0\n\n[Network]\nDHCP=ipv4\n' >"$root/etc/systemd/network/10-eth0.network"
systemctl --quiet --root="$root" enable systemd-networkd

install -m 755 "$here/agent.sh" "$root/usr/local/sbin/agent"
cat >"$root/etc/systemd/system/agent.service" <<'UNIT'
[Unit]
Description=Commands by a virtio console
After=basic.target

[Service]
Environment=HOME=/root
ExecStart=/bin/sh -c 'exec agent /dev/vport*'
Restart=always
KillMode=process

[Install]
WantedBy=multi-user.target
UNIT
cat >"$root/etc/systemd/system/machine-up.service" <<'UNIT'
[Unit]
Description=A word on the console when the machine has booted
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo "machine is up: $(uname -r), boot $(cat /proc/sys/kernel/random/boot_id)" >/dev/console'

[Install]
WantedBy=multi-user.target
UNIT
systemctl --quiet --root="$root" enable agent machine-up
# Nobody logs in, and what is due once a day would take the time of the test.
systemctl --quiet --root="$root" mask serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer \
    dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer

mkdir -p "$folder"
rm -f "$folder/made-by"
size=$(($(du -sm "$root" | cut -f1) + 1500))
rm -f "$folder/root.img"
mke2fs -q -t ext4 -m 0 -d "$root" "$folder/root.img" "${size}M" >/dev/null
echo "$made_by" >"$folder/made-by"
echo "Debian is there after $SECONDS s"
