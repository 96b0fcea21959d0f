#!/bin/bash
# root.sh IMAGE PROGRAMS [TEST...]: packs what machines run into an ext4 image, their root below a memory of changes:
# tools of this machine with their libraries, the CNI plugins, and ours from the folder PROGRAMS. TESTs go to /tests.
set -euo pipefail
image=$1 programs=$2 here=$(dirname "$(realpath "$0")")
shift 2
PATH=$PATH:/usr/sbin:/sbin
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{dev,proc,sys,run,tmp,var,root,tests,etc/cni/net.d,opt/cni/bin,lib/modules,usr/{bin,sbin,lib,lib64}}
# As Debian has it: what programs are linked to lies in /lib64 and /lib/x86_64-linux-gnu.
rmdir "$root/lib/modules" "$root/lib"
for folder in bin sbin lib lib64; do ln -s usr/$folder "$root/$folder"; done
mkdir "$root/lib/modules"

libraries() { # libraries PROGRAM: what it is linked to, where it wants to find it
    { ldd "$1" 2>/dev/null || true; } | sed -nE 's/.*=> (\/[^ ]+) .*/\1/p; s/^\s*(\/[^ ]+) .*/\1/p'
}
bring() { # bring PROGRAM FOLDER: a copy without symbols, and its libraries
    local library
    install -D -m 755 -t "$root/$2" "$1"
    strip "$root/$2/$(basename "$1")"
    for library in $(libraries "$1"); do
        [ -e "$root/$library" ] || install -D "$(realpath "$library")" "$root/$library"
    done
}
for tool in dash bash busybox ip bridge tc ping nft ethtool tcpdump conntrack kmod; do
    bring "$(realpath "$(command -v "$tool")")" usr/bin
done
ln -s dash "$root/usr/bin/sh"
mkdir -p "$root/usr/libexec/busybox"
for applet in $(busybox --list); do ln -s ../../bin/busybox "$root/usr/libexec/busybox/$applet"; done
for link in modprobe depmod lsmod rmmod insmod; do ln -s ../bin/kmod "$root/usr/sbin/$link"; done
for plugin in bridge host-local loopback portmap; do bring "/usr/lib/cni/$plugin" opt/cni/bin; done
for program in fabricd fabricctl; do bring "$programs/$program" usr/bin; done
for plugin in fabric-cni fabric-bridge; do bring "$programs/$plugin" opt/cni/bin; done
for test in "$@"; do bring "$test" tests; done
install -D -m 755 "$here/init.sh" "$root/usr/sbin/init"
install -D -m 755 "$here/agent.sh" "$root/usr/sbin/agent"
install -D -m 644 "$here/../../../deploy/systemd/modules-load.conf" "$root/usr/lib/modules-load.d/fabricd.conf"
echo 'root:x:0:0::/root:/bin/sh' >"$root/etc/passwd"
# A client of TLS wants some, be it for an API server without TLS.
install -D -m 644 -t "$root/etc/ssl/certs" /etc/ssl/certs/ca-certificates.crt
echo 'hosts: files' >"$root/etc/nsswitch.conf"

size=$(($(du -sm "$root" | cut -f1) * 5 / 4 + 16))
rm -f "$image"
mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$root" "$image" "${size}M" >/dev/null
