# What differs between the stores, for `run`: the manifest, what makes it ready, and how the store is taken away. With one
# family it is the file that users apply; with two, the overlays that have most in them. Sourced by `run`.

components=() patches=()
use_etcd() {
    store=etcd
    if [ "$DUAL" = 1 ]; then
        overlay=etcd-ha components=(dual-stack-etcd)
        # No node is labelled yet, so there is no etcd.
        make_ready() { for_each_node label_member; }
        node_was_added() { label_member "$1"; }
    else
        manifest=$root/deploy/fabricd-etcd.yaml
        make_ready() { label_member n1; }
        node_was_added() { :; }
    fi
    # Frozen: connections stay, and nobody answers.
    lose_store() { for_each_node signal_member STOP; }
    find_store() { for_each_node signal_member CONT; }
}

# use_component NAME: the Kubernetes store's overlay with this on top; what it has to be told of this cluster is in patches
use_component() {
    overlay=kubernetes-store components+=("$1") patches=()
    [ "$1" != services ] || patches=("{apiVersion: v1, kind: ConfigMap, metadata: {name: fabric-api-server, namespace: fabric-system},
        data: {KUBERNETES_SERVICE_HOST: $UNDERLAY.1}}")
}

label_member() { kube label node "$1" fabric-etcd=$((${1#n} - 1)) >/dev/null; }
signal_member() { in_machine "$2" pkill "-$1" -x etcd || true; } # not every node has one

use_kubernetes() {
    store="API server"
    if [ "$DUAL" = 1 ]; then
        overlay=kubernetes-store components=(dual-stack-kubernetes startup-taint)
        export STARTUP_TAINT=fabric.io/not-ready
    else
        manifest=$root/deploy/fabricd-kubernetes.yaml
    fi
    # The controller manager gives the Nodes their podCIDRs, from then on each new one too.
    make_ready() { touch "$STATE/allocate-podcidrs"; }
    node_was_added() { :; }
    # As if its machine were off; those on that machine don't notice.
    lose_store() { in_machine cp iptables -I INPUT "${api_port[@]}"; }
    find_store() { in_machine cp iptables -D INPUT "${api_port[@]}"; }
    api_port=(-i underlay -p tcp --dport 6443 -j DROP)
}

for_each_node() {
    local node
    for node in $(nodes); do "$@" "$node"; done
}

# The manifest of the overlay and its components, as somebody with a folder of his own would make it.
render() {
    local component patch deploy
    [ -n "${overlay:-}" ] || return 0
    mkdir "$STATE/overlay"
    deploy=$(realpath --relative-to="$STATE/overlay" "$root/deploy/kubernetes")
    {
        printf 'resources: [%s]\ncomponents:\n' "$deploy/$overlay"
        for component in "${components[@]}"; do echo "  - $deploy/components/$component"; done
        [ ${#patches[@]} = 0 ] || echo "patches:"
        for patch in "${patches[@]}"; do printf '  - patch: |\n      %s\n' "${patch//$'\n'/}"; done
    } >"$STATE/overlay/kustomization.yaml"
    manifest=$STATE/$overlay.yaml
    kubectl kustomize "$STATE/overlay" >"$manifest"
}
