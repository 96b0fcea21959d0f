# What the scripts of this folder share: where things are, which addresses they have, and how a machine of the cluster is
# entered. Sourced by all of them; every setting can be overridden by the environment.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

# Which Kubernetes: the one that programs/go.mod pins, or the oldest that is supported, VERSION=1.20.
modern=$(sed -n 's|^\tk8s.io/kubernetes v||p' "$here/programs/go.mod")
oldest=1.20.2
case ${VERSION:-$modern} in
"$modern" | "${modern%.*}") KUBERNETES_VERSION=$modern ;;
"$oldest" | "${oldest%.*}") KUBERNETES_VERSION=$oldest ;;
*)
    echo "VERSION=$VERSION: there are ${modern%.*} and ${oldest%.*}" >&2
    exit 2
    ;;
esac
is_oldest() { [ "$KUBERNETES_VERSION" = "$oldest" ]; }
CACHE=${FABRIC_E2E_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fabricd/kubernetes}/$KUBERNETES_VERSION
export PATH=$CACHE:$PATH                    # its containerd, etcd and kubectl before this machine's
STATE=${FABRIC_E2E_STATE:-$root/target/e2e} # all state of the running cluster
PREFIX=${PREFIX:-fe2e}                      # of network namespaces
CGROUP=${CGROUP:-fabric-e2e}                # parent of the nodes' cgroups
STARTUP_TAINT=${STARTUP_TAINT:-}            # key of a taint that kubelets register their nodes with
BARE_NODE=${BARE_NODE:-}                    # the node that has no CNI plugin, if any

DUAL=${DUAL:-0} # 1: IPv4 and IPv6
UNDERLAY=10.250.0 UNDERLAY6=fd00:250: # .1 is the control plane, .11 node n1, .12 node n2 …
PODS=10.244.0.0/16 PODS6=fd00:244::/48
SERVICES=10.96.0.0/16 SERVICES6=fd00:96::/112
API_SERVICE=10.96.0.1 DNS_SERVICE=10.96.0.10
PROXY_MODE=${PROXY_MODE:-iptables} # of kube-proxy: iptables or nftables; none: it isn't there
feature_gates=
if [ "$DUAL" = 1 ]; then
    ! is_oldest || feature_gates=--feature-gates=IPv6DualStack=true # still alpha there
    PODS+=,$PODS6
    SERVICES+=,$SERVICES6
fi

# The folders below /sys/fs/cgroup where kubelet and containerd make groups, and those that hold leftovers.
controllers="cpu cpuacct cpuset memory devices freezer blkio pids systemd"

# in_machine MACHINE COMMAND...: runs it in all namespaces of the control plane (cp) or of a node (n1).
in_machine() {
    local machine=$1
    shift
    nsenter --target "$(<"$STATE/$machine/pid")" --mount --uts --ipc --net --pid -- "$@"
}

# As the cluster's administrator.
kube() { ip netns exec "$PREFIX-cp" kubectl --kubeconfig="$STATE/pki/admin.conf" "$@"; }

nodes() { seq -f 'n%.0f' "$(<"$STATE/nodes")"; }

# until_true SECONDS COMMAND...: false if it doesn't come true in time.
until_true() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || return 1
        sleep 0.2
    done
}
