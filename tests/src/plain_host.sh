#!/bin/bash
# plain_host.sh FOLDER: becomes systemd, in namespaces of its own, before this machine's files under an overlay.
set -euo pipefail
folder=$1 stage=${2:-outside}

# The hierarchy that systemd keeps its units in: its own or, where there is but one, that one.
hierarchy=/sys/fs/cgroup/systemd type=(-t cgroup -o none,name=systemd)
[ -d $hierarchy ] || hierarchy=/sys/fs/cgroup type=(-t cgroup2)

if [ "$stage" = outside ]; then
    group=$hierarchy/${folder##*/}
    mkdir "$group"
    echo $$ >"$group/cgroup.procs"
    exec unshare --net --mount --uts --ipc --pid --cgroup --fork --kill-child --propagation private \
        bash "$0" "$folder" inside
fi

mount -t tmpfs tmpfs "$folder"
mkdir "$folder"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$folder/root"
cd "$folder/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
    touch "dev/$device"
    mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
if [ $hierarchy = /sys/fs/cgroup ]; then
    mount "${type[@]}" cgroup sys/fs/cgroup
else
    mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
    mkdir ".$hierarchy"
    mount "${type[@]}" cgroup ".$hierarchy"
fi

# What has no namespace stays as it is: this machine's own systemd has set it.
for unit in systemd-sysctl systemd-modules-load systemd-binfmt; do ln -sf /dev/null "etc/systemd/system/$unit.service"; done
# Not what this machine would start.
printf '[Unit]\nRequires=basic.target\n' >etc/systemd/system/plain-host.target
rm -rf etc/cni opt/cni
ip link set lo up
hostname plain-host
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    chroot . /lib/systemd/systemd --unit=plain-host.target --log-target=journal
