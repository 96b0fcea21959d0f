#!/bin/sh
# The first process of a machine: file systems, addresses by the kernel's command line, the agent. Reaps what others leave.
export PATH=/usr/sbin:/usr/bin:/usr/libexec/busybox
mount -t tmpfs -o mode=755 run /run
mkdir -p /dev/pts /run/netns /run/lock
mount -t devpts devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t ext4 /dev/vda /var
mkdir -p /var/lib /var/log
ln -sfn /run /var/run
addresses= gateways=
for word in $(cat /proc/cmdline); do
    case $word in
    machine.name=*) hostname "${word#*=}" ;;
    machine.addresses=*) addresses=$(echo "${word#*=}" | tr , ' ') ;;
    machine.gateways=*) gateways=$(echo "${word#*=}" | tr , ' ') ;;
    esac
done
hostname >/etc/hostname
ip link set lo up
for address in $addresses; do
    case $address in *:*) nodad=nodad ;; *) nodad= ;; esac
    ip address add "$address" dev eth0 $nodad
done
ip link set eth0 up
for gateway in $gateways; do ip route add default via "$gateway"; done
# As the package has it. What is missing is told by whom it is missed.
modprobe -qa $(grep -v '^#' /usr/lib/modules-load.d/fabricd.conf) || true
port=$(basename /sys/class/virtio-ports/vport*)
setsid agent "/dev/$port" &
echo "machine is up: $(uname -r), boot $(cat /proc/sys/kernel/random/boot_id), $(cut -d' ' -f1 /proc/uptime) s"
while :; do
    wait
    sleep 60
done
