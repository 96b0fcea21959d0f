# The settings of a node's containerd, kubelet and kube-proxy, each version in its own words. Sourced by `node`, which has
# set $name, $address and $pki; sets $addresses and $runtime for kubelet's command line.

addresses=$address
bind=0.0.0.0
runtime=()
kubelet_settings= proxy_settings=
if is_oldest; then
    # Its words are flags, and those of dual stack a feature gate.
    runtime=(--container-runtime=remote --container-runtime-endpoint=unix:///run/containerd/containerd.sock)
    bind=$address
    proxy_settings="featureGates: {IPv6DualStack: $([ "$DUAL" = 1 ] && echo true || echo false)}
iptables: {minSyncPeriod: 0s, syncPeriod: 30s}"
    cat >/etc/containerd/config.toml <<TOML
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/probe:1"
  disable_apparmor = true
  restrict_oom_score_adj = true
TOML
else
    [ "$DUAL" = 0 ] || addresses+=,$UNDERLAY6:1${name#n}
    # Where a machine has both, the controllers are in the hierarchies of version 1.
    kubelet_settings="containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
failCgroupV1: false"
    cat >/etc/containerd/config.toml <<TOML
version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'localhost/probe:1'
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['/opt/cni/bin']
  conf_dir = '/etc/cni/net.d'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = false
TOML
fi

cat >/etc/kubernetes/kubelet.yaml <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $pki/ca.crt}
authorization: {mode: Webhook}
healthzBindAddress: 127.0.0.1
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP/$name
failSwapOn: false
evictionHard: {memory.available: 100Mi, nodefs.available: "1%", nodefs.inodesFree: "1%", imagefs.available: "1%"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
clusterDomain: cluster.local
clusterDNS: [$DNS_SERVICE]
resolvConf: /etc/resolv.conf
nodeStatusUpdateFrequency: 4s
syncFrequency: 10s
$kubelet_settings
YAML
cat >/etc/kubernetes/proxy.yaml <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: $PROXY_MODE
hostnameOverride: $name
bindAddress: $bind
clusterCIDR: "$PODS"
clientConnection: {kubeconfig: $pki/proxy.conf}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
$proxy_settings
YAML
