# What operators get wrong in Kubernetes, and how they are told: on the Node, by status and doctor, with the command against
# it. Sourced by `run`.

# told_on NODE WORDS: as kubectl describe node shows it
told_on() { kube describe node "$1" | grep -qF "$2"; }
# is_told NODE WORDS: on the Node and by status
is_told() {
    until_true 90 told_on "$1" "$2" || die "the Node $1 doesn't say \"$2\": $(kube describe node "$1")"
    [[ $(status "$1") == *"$2"* ]] || die "status on $1 doesn't say \"$2\": $(status "$1")"
}
doctor_says() { [[ $(fabricctl_on "$1" doctor || true) == *"$2"* ]]; }
is_well() { says "$1" 'State *ready' && says "$1" 'Store *connected'; }

no_subnets_are_assigned() {
    until_true 60 told_on n1 "no IPv4 subnet is assigned to this node" || die "a Node without podCIDRs doesn't say so: $(kube describe node n1)"
    ok "a Node without podCIDRs says what is missing: $(kube get node n1 -o \
        jsonpath='{.status.conditions[?(@.type=="NetworkUnavailable")].message}')"
    touch "$STATE/allocate-podcidrs"
}

# Another CNI's configuration comes, and is taken first.
another_cni() {
    local fix file=/etc/cni/net.d/05-other.conflist
    in_machine n1 sh -c "echo '{\"cniVersion\": \"1.0.0\", \"name\": \"other\", \"plugins\": [{\"type\": \"ptp\"}]}' >$file"
    is_told n1 "$file sorts before"
    doctor_says n1 "mv $file $file.disabled" || die "doctor doesn't tell how to disable another CNI: $(fabricctl_on n1 doctor)"
    fix=$(status n1 | grep -o "mv $file.*disabled")
    in_machine n1 sh -c "$fix"
    until_true 30 forgets n1 "$file sorts before" || die "the other CNI is disabled, and status still warns: $(status n1)"
    in_machine n1 rm "$file.disabled"
    ok "another CNI's configuration that sorts first is told on the Node, and gone after: $fix"
}
forgets() { [[ $(status "$1") != *"$2"* ]]; }

# The node's own network becomes one that the pods' lies in.
network_overlaps() {
    in_machine n1 ip address add 10.244.99.1/16 dev eth0 noprefixroute
    is_told n1 "overlaps"
    in_machine n1 ip address delete 10.244.99.1/16 dev eth0
    until_true 60 is_well n1 || die "the overlap is gone, and n1 says: $(status n1)"
    ok "a network of the node that overlaps the pods' is told on the Node; its pods go on, and it is ready again without it"
}

# The right to read Nodes is taken away while the daemons run; those that begin then see it at once, the others later.
rights_are_taken_away() {
    local fix rights='can-i list nodes --as=system:serviceaccount:fabric-system:fabricd'
    kube patch clusterrole fabricd --type=json -p '[{"op": "remove", "path": "/rules/0"}]' >/dev/null
    in_machine n1 pkill -KILL -xf /bin/fabricd
    until_true 60 doctor_says n1 "$rights" || die "doctor doesn't say which right is missing: $(fabricctl_on n1 doctor)"
    is_told n1 "$rights"
    fix=$(status n1 | grep -o "kubectl auth $rights" | head -1)
    # It warns that Nodes are in no namespace.
    # shellcheck disable=SC2086 # it is a command
    [ "$(kube ${fix#kubectl } 2>/dev/null || true)" = no ] || die "$fix doesn't say no"
    kube apply -f "$manifest" >/dev/null
    # shellcheck disable=SC2086
    [ "$(kube ${fix#kubectl } 2>/dev/null)" = yes ] || die "$fix doesn't say yes"
    until_true 60 is_well n1 || die "the right is given back, and n1 says: $(status n1)"
    ok "a right that is taken away is told on the Node, by status and doctor: $fix"
}

mistakes_scenario() {
    echo "--- what operators get wrong, store kubernetes, $families"
    use_kubernetes
    start
    render
    install no_subnets_are_assigned
    talk
    under_a_stream another_cni
    ok "meanwhile a stream between pods: $heard"
    under_a_stream network_overlaps
    ok "meanwhile a stream between pods: $heard"
    under_a_stream rights_are_taken_away
    ok "meanwhile a stream between pods: $heard"
    everybody_pings_everybody >/dev/null
    removal
    cluster down
}
