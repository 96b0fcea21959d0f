# What `run` looks at. Sourced by it.

ready_nodes() { kube get nodes --no-headers | grep -cw Ready || true; }
tainted_nodes() {
    kube get nodes -o jsonpath='{range .items[*]}{.spec.taints[*].key}{"\n"}{end}' | grep -cF "$STARTUP_TAINT" || true
}
# Ready, and without the taint that they register with, if there is one.
all_are_ready() { [ "$(ready_nodes)" = "$(nodes | wc -l)" ] && { [ -z "$STARTUP_TAINT" ] || [ "$(tainted_nodes)" = 0 ]; }; }
not_one_is_ready() { [ "$(ready_nodes)" = 0 ] && { [ -z "$STARTUP_TAINT" ] || [ "$(tainted_nodes)" = "$(nodes | wc -l)" ]; }; }

# pod NODE: the probe on it
pod() { kube get pods -l app=probe --field-selector "spec.nodeName=$1" -o jsonpath='{.items[0].metadata.name}'; }
pod_ips() { kube get pods -l app=probe --field-selector "spec.nodeName=$1" -o jsonpath='{.items[0].status.podIPs[*].ip}'; }
pod_ip() { pod_ips "$1" | cut -d' ' -f1; }
# probe NODE ARGUMENTS...
probe() {
    local on
    on=$(pod "$1")
    shift
    kube exec -i "$on" -- probe "$@"
}
# What fabricd says about a node, from inside its container, whether or not there is an API server. 3: it is not ready, 4: it warns of something.
status() { fabricctl_on "$1" status || [[ $? = [34] ]]; }
# fabricctl_on NODE ARGUMENTS...
fabricctl_on() {
    local node=$1
    shift
    in_machine "$node" sh -c 'nsenter --target "$(pgrep -xf /bin/fabricd)" --mount --root /bin/fabricctl "$@"' sh "$@"
}
says() { grep -q "^$2" <<<"$(status "$1")"; }
# All that fabricd made in the kernel of a node, in iproute2's words; what pods made is not in it.
kernel_state() {
    in_machine "$1" sh -c 'ip -d link show type vxlan; ip route show proto 250; ip -6 route show proto 250
        ip nexthop show proto 250; bridge fdb show | grep fabric; ip neigh show nud permanent' |
        grep -v 'valid_lft\|^ *RX\|^ *TX' | sort
}
# What an installation could leave on a node. Not the other end of a card's cable, which a reboot changes, nor what
# containerd has noted of its own in /var/lib/cni/results: where power failed amid an ADD, that stays.
traces() {
    in_machine "$1" sh -c 'ip -brief link | cut -d" " -f1 | cut -d@ -f1 | grep -v "^veth\|^kube\|^nodelocaldns"; ip route; ip -6 route
        ip nexthop; nft list tables | grep fabric
        find /opt/cni/bin /etc/cni/net.d /run/fabric /run/flannel /var/lib/fabric /var/lib/cni /sys/fs/bpf/fabric ! -type d 2>/dev/null; true' |
        grep -v ^/var/lib/cni/results | sort
}
# Nobody adds pods meanwhile: the addresses that this folder has are those of pods.
everybody_pings_everybody() {
    local from to ip pairs=0
    for from in $(nodes); do
        for to in $(nodes); do
            for ip in $(pod_ips "$to"); do
                kube exec "$(pod "$from")" -- ping -q -c 3 -i 0.2 -w 10 "$ip" | grep -q ' 0% packet loss' ||
                    die "the pod on $from can't ping $ip on $to"
                pairs=$((pairs + 1))
            done
        done
    done
    echo "$pairs pairs of node and address"
}
probes_are_everywhere() { kube rollout status daemonset/probe --timeout=180s >/dev/null; }

# --- a stream that counts, while something is done ---------------------------------------------------------------------

# under_a_stream COMMAND...: its words are in $heard
under_a_stream() {
    local to out=$STATE/stream pid
    to=$(pod_ip n2)
    rm -f "$out" "$out.stop"
    mkfifo "$out.stop"
    probe n1 stream "$to" <"$out.stop" >"$out" 2>&1 &
    pid=$!
    exec 9>"$out.stop"
    until_true 30 grep -q flows "$out" || die "no stream from n1 to n2: $(<"$out")"
    "$@" 9>&- # whoever keeps it open keeps the stream flowing: a node that boots, for one
    exec 9>&-
    wait $pid || die "under a stream from n1 to n2, $*: $(<"$out")"
    heard=$(tail -1 "$out")
}
