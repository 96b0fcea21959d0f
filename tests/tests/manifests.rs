//! The manifests of `deploy/`: the files for `kubectl apply -f` are what the folders say, and name this version.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use fabricd::diagnosis::{MASQUERADE_IN_KUBERNETES, Places};
use serde_json::{Value, json};

const FILES: [&str; 3] = ["fabricd-etcd.yaml", "fabricd-kubernetes.yaml", "fabricd-cleanup.yaml"];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{command:?}: {told}{}", String::from_utf8_lossy(&output.stderr));
    Ok(told)
}

#[test]
fn files_to_apply_are_what_kustomize_makes_of_the_folders() -> Result<()> {
    output(Command::new(deploy().join("kubernetes/render")).arg("--check"))?;
    Ok(())
}

/// Each overlay by its folder's name, and its objects.
fn overlays() -> Result<Vec<(String, Vec<Value>)>> {
    let mut overlays = vec![];
    for folder in std::fs::read_dir(deploy().join("kubernetes"))? {
        let folder = folder?.path();
        if folder.join("kustomization.yaml").is_file() {
            let rendered = output(Command::new("kubectl").arg("kustomize").arg(&folder))?;
            let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            overlays.push((name, serde_saphyr::from_multiple(&rendered)?));
        }
    }
    ensure!(overlays.len() > 5, "only {} overlays", overlays.len());
    Ok(overlays)
}

/// The objects of a folder with components on top, as somebody with a folder of his own would have them.
fn with_components(folder: &str, components: &[&str]) -> Result<Vec<Value>> {
    let own = tempfile::tempdir()?;
    let depth = own.path().canonicalize()?.components().count() - 1;
    let kubernetes = format!("{}{}", "../".repeat(depth), deploy().join("kubernetes").canonicalize()?.display());
    let components: Vec<_> = components.iter().map(|name| format!("{kubernetes}/components/{name}")).collect();
    let kustomization = json!({"resources": [format!("{kubernetes}/{folder}")], "components": components});
    std::fs::write(own.path().join("kustomization.yaml"), kustomization.to_string())?;
    let rendered = output(Command::new("kubectl").arg("kustomize").arg(own.path()))?;
    Ok(serde_saphyr::from_multiple(&rendered)?)
}

fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let found = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.with_context(|| format!("no {kind} {name}"))
}

#[test]
fn every_overlay_can_be_rendered() -> Result<()> {
    for (name, objects) in overlays()? {
        ensure!(objects.iter().any(|object| object["kind"] == "DaemonSet"), "{name}");
    }
    Ok(())
}

/// What k3s and RKE2 give pods by default.
#[test]
fn overlay_and_chart_values_for_k3s_have_its_pod_network() -> Result<()> {
    let overlays = overlays()?;
    let (_, objects) = overlays.iter().find(|(name, _)| name == "k3s").context("no overlay k3s")?;
    let document = object(objects, "ConfigMap", "fabric-network")?["data"]["net-conf.json"].as_str();
    let network: Value = serde_json::from_str(document.context("a document")?)?;
    assert_eq!(network["Network"], "10.42.0.0/16");
    let values = std::fs::read_to_string(deploy().join("helm/fabricd/values-k3s.yaml"))?;
    let values: Value = serde_saphyr::from_str(&values)?;
    assert_eq!(values, json!({"store": "kubernetes", "network": {"ipv4": "10.42.0.0/16"}}));
    Ok(())
}

/// As flannel's manifest has it; where there is no Kubernetes, the package.
#[test]
fn pods_reach_the_outside_wherever_it_is_installed() -> Result<()> {
    for (name, objects) in overlays()?.iter().filter(|(name, _)| name != "cleanup") {
        let settings = &object(objects, "ConfigMap", "fabricd")?["data"];
        ensure!(settings["FABRICD_IP_MASQ"] == "true", "{name}: {settings}");
    }
    let package = std::fs::read_to_string(deploy().join("systemd/fabricd.default"))?;
    ensure!(package.lines().any(|line| line == "FABRICD_IP_MASQ=true"), "{package}");
    Ok(())
}

/// Which containers of a pod see a volume: their names, where it is in them, and whether they only read it.
fn mounts<'a>(pod: &'a Value, volume: &str) -> Vec<(&'a str, &'a str, bool)> {
    let containers = ["initContainers", "containers"].into_iter().flat_map(|kind| pod[kind].as_array()).flatten();
    let mounts = containers.flat_map(|container| {
        let mounts = container["volumeMounts"].as_array().into_iter().flatten();
        mounts.map(|mount| (container["name"].as_str().unwrap_or_default(), mount))
    });
    let of_volume = mounts.filter(|(_, mount)| mount["name"] == volume);
    of_volume
        .map(|(name, mount)| (name, mount["mountPath"].as_str().unwrap_or_default(), mount["readOnly"] == true))
        .collect()
}

/// Of one node they are never there together, and both daemons neither.
#[test]
fn a_nodes_label_says_whether_it_is_taken_over_from_flannel_or_given_back() -> Result<()> {
    let overlays = overlays()?;
    let (_, objects) = overlays.iter().find(|(name, _)| name == "beside-flannel").context("the overlay")?;
    const LABEL: &str = "fabric.io/pod-network";
    let image = format!("localhost/fabricd:{}", env!("CARGO_PKG_VERSION"));
    for (name, label) in [("fabricd", "fabricd"), ("fabricd-takeover", "fabricd"), ("fabricd-giveback", "flannel")] {
        let pod = &object(objects, "DaemonSet", name)?["spec"]["template"]["spec"];
        assert_eq!(pod["nodeSelector"], json!({ "kubernetes.io/os": "linux", LABEL: label }), "{name}");
        let containers = pod["initContainers"].as_array().into_iter().chain(pod["containers"].as_array()).flatten();
        assert!(containers.clone().all(|container| container["image"] == image), "{name}");
        if name != "fabricd" {
            assert_eq!((&pod["hostNetwork"], &pod["hostPID"]), (&json!(true), &json!(true)), "it looks for flanneld");
            for container in containers {
                let rights = &container["securityContext"]["capabilities"];
                assert_eq!(*rights, json!({ "drop": ["ALL"], "add": ["NET_ADMIN", "SYS_PTRACE"] }), "{name}");
            }
        }
    }
    let giveback = &object(objects, "DaemonSet", "fabricd-giveback")?["spec"]["template"]["spec"];
    assert_eq!(mounts(giveback, "run-flannel"), [("giveback", "/run/flannel", true), ("done", "/run/flannel", true)]);
    let patch = std::fs::read_to_string(deploy().join("kubernetes/beside-flannel/kube-flannel.yaml"))?;
    let patch: Value = serde_saphyr::from_str(&patch)?;
    let affinity = &patch["spec"]["template"]["spec"]["affinity"]["nodeAffinity"];
    let terms = &affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]["matchExpressions"];
    assert_eq!(terms[1], json!({ "key": LABEL, "operator": "NotIn", "values": ["fabricd"] }));
    Ok(())
}

/// Otherwise `fabricctl doctor` could not see that another network's configuration comes first.
#[test]
fn daemons_read_the_runtimes_network_configurations_where_they_look_for_them() -> Result<()> {
    let folder = Places::usual().cni_conf.display().to_string();
    for (name, objects) in overlays()?.iter().filter(|(name, _)| name != "cleanup") {
        let pod = &object(objects, "DaemonSet", "fabricd")?["spec"]["template"]["spec"];
        let expected = [("fabricd", &*folder, true), ("conflist", "/host/etc/cni/net.d", false)];
        assert_eq!(mounts(pod, "cni-conf"), expected, "{name}");
        let volumes = pod["volumes"].as_array().into_iter().flatten();
        let host: Vec<_> =
            volumes.filter(|volume| volume["name"] == "cni-conf").map(|volume| &volume["hostPath"]["path"]).collect();
        assert_eq!(host, [&*folder], "fixes name the host's files; {name}");
    }
    Ok(())
}

/// The daemon has a certificate to show, and none of the key by which certificates are made.
#[test]
fn daemons_can_ask_each_other_and_do_not_see_the_authoritys_key() -> Result<()> {
    for (name, objects) in overlays()?.iter().filter(|(name, _)| name != "cleanup") {
        let settings = &object(objects, "ConfigMap", "fabricd")?["data"];
        ensure!(settings["FABRICD_API_ADDR"] == "[::]:9473", "{name}: {settings}");
        let pod = &object(objects, "DaemonSet", "fabricd")?["spec"]["template"]["spec"];
        assert_eq!(mounts(pod, "api-ca"), [("certificate", "/ca", true)], "{name}");
        assert_eq!(mounts(pod, "api"), [("fabricd", "/api", true), ("certificate", "/api", false)], "{name}");
        // The network needs none of it: a missing authority holds up no pod.
        let volumes = pod["volumes"].as_array().into_iter().flatten();
        let authority = volumes.filter(|volume| volume["name"] == "api-ca").map(|volume| &volume["secret"]);
        let authority: Vec<_> = authority.collect();
        assert_eq!(authority, [&json!({"secretName": "fabric-api-ca-key", "optional": true})], "{name}");
        let job = object(objects, "Role", "fabric-api-pki")?;
        let rules = json!([
            {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]},
            {
                "apiGroups": [""],
                "resources": ["secrets"],
                "resourceNames": ["fabric-api-ca", "fabric-api-ca-key"],
                "verbs": ["get"]
            }
        ]);
        assert_eq!(job["rules"], rules, "{name}");
    }
    Ok(())
}

/// A missing archive is told before a cluster is made.
#[test]
fn kind_is_not_begun_without_an_image() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for folder in ["deploy/kind", "bin"] {
        std::fs::create_dir_all(dir.path().join(folder))?;
    }
    for file in ["deploy/kind/up", "deploy/kind/cluster.yaml"] {
        std::fs::copy(deploy().join("..").join(file), dir.path().join(file))?;
    }
    for tool in ["kind", "kubectl"] {
        std::os::unix::fs::symlink("/bin/true", dir.path().join("bin").join(tool))?;
    }
    let path = format!("{}:/usr/bin:/bin", dir.path().join("bin").display());
    let run = || Command::new(dir.path().join("deploy/kind/up")).env("PATH", &path).output();
    let refused = run()?;
    let told = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        !refused.status.success() && told.contains("target/image/fabricd.tar; build it with: make image"),
        "{told}"
    );
    std::fs::create_dir_all(dir.path().join("target/image"))?;
    std::fs::write(dir.path().join("target/image/fabricd.tar"), "")?;
    ensure!(run()?.status.success(), "with it, it goes on");
    Ok(())
}

#[test]
fn make_help_lists_every_target() -> Result<()> {
    let makefile = std::fs::read_to_string(deploy().join("../Makefile"))?;
    let help = output(Command::new("make").arg("--no-print-directory").arg("help").current_dir(deploy().join("..")))?;
    let targets = makefile.lines().find_map(|line| line.strip_prefix(".PHONY: ")).context("targets")?;
    for target in targets.split_whitespace() {
        ensure!(help.lines().any(|line| line.split_whitespace().next() == Some(target)), "no {target} in {help}");
    }
    Ok(())
}

#[test]
fn images_are_those_of_this_version() -> Result<()> {
    let ours = concat!("localhost/fabricd:", env!("CARGO_PKG_VERSION"));
    for file in FILES {
        let text = std::fs::read_to_string(deploy().join(file))?;
        let images = text.lines().filter_map(|line| line.trim_start_matches([' ', '-']).strip_prefix("image: "));
        for image in images.filter(|image| image.contains("fabricd")) {
            ensure!(image == ours, "{file} has {image}, not {ours}");
        }
    }
    Ok(())
}

/// What a pod of the daemon may do. Each line is a promise of docs/security.md.
#[test]
fn daemon_has_no_more_rights_than_it_needs() -> Result<()> {
    let text = std::fs::read_to_string(deploy().join(FILES[0]))?;
    ensure!(!text.contains("privileged: true"), "nothing is privileged");
    ensure!(text.matches("readOnlyRootFilesystem: true").count() == text.matches("  image: ").count());
    ensure!(text.matches("- ALL").count() == text.matches("  image: ").count(), "all capabilities are dropped");
    ensure!(text.matches("- NET_ADMIN").count() == 1, "one container has two back");
    ensure!(text.matches("- NET_RAW").count() == 1, "one container has two back");
    ensure!(!text.contains("nodes"), "with etcd nobody reads the API server's nodes");
    Ok(())
}

/// The capabilities of the daemon's container.
fn capabilities(objects: &[Value]) -> Result<Vec<&str>> {
    let pod = &object(objects, "DaemonSet", "fabricd")?["spec"]["template"]["spec"];
    let added = pod["containers"][0]["securityContext"]["capabilities"]["add"].as_array();
    Ok(added.into_iter().flatten().filter_map(Value::as_str).collect())
}

/// What the daemon may do with objects of the whole cluster: `list watch nodes`.
fn cluster_rights(objects: &[Value]) -> Vec<String> {
    let words =
        |list: &Value| list.as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join(" ");
    let roles = objects.iter().filter(|object| object["kind"] == "ClusterRole");
    let rules = roles.flat_map(|role| role["rules"].as_array().into_iter().flatten());
    rules.map(|rule| format!("{} {}", words(&rule["verbs"]), words(&rule["resources"]))).collect()
}

/// Who has nothing switched on has the rights for nothing.
#[test]
fn each_component_gives_the_daemon_what_it_takes_and_no_more() -> Result<()> {
    let plain = ["NET_ADMIN", "NET_RAW"];
    let fast = ["NET_ADMIN", "NET_RAW", "BPF", "PERFMON"];
    let policy = [
        "list watch networkpolicies",
        "list watch clusternetworkpolicies",
        "list watch namespaces pods",
        "create events",
    ];
    let services = ["list watch services nodes", "list watch endpointslices", "list servicecidrs", "create events"];
    for (component, setting, value, capable, rights) in [
        // What others have loaded is not passed by unless somebody asks for it.
        ("fast-path", "FABRICD_FAST_PATH", "auto", &fast[..], &[][..]),
        ("network-policy", "FABRICD_NETWORK_POLICY", "on", &plain[..], &policy[..]),
        ("services", "FABRICD_SERVICES", "on", &plain[..], &services[..]),
    ] {
        let (without, with) = (with_components("etcd", &[])?, with_components("etcd", &[component])?);
        for (objects, switched, capable, rights) in
            [(&without, &Value::Null, &plain[..], &[][..]), (&with, &json!(value), capable, rights)]
        {
            assert_eq!(&object(objects, "ConfigMap", "fabricd")?["data"][setting], switched, "{component}");
            assert_eq!(capabilities(objects)?, capable, "{component}");
            assert_eq!(cluster_rights(objects), rights, "{component}");
            let token = &object(objects, "ServiceAccount", "fabricd")?["automountServiceAccountToken"];
            assert_eq!(token, !rights.is_empty(), "a token for those who ask the API server; {component}");
        }
    }
    Ok(())
}

/// With the cluster's own store it reads Nodes, and says on its own what it is like.
#[test]
fn daemon_of_the_kubernetes_store_reads_nodes_and_writes_their_status_and_events_alone() -> Result<()> {
    let rights = cluster_rights(&with_components("kubernetes-store", &[])?);
    assert_eq!(rights, ["list watch nodes", "patch nodes/status", "create events"]);
    Ok(())
}

/// Nobody but the daemon, where it needs it, and the cleanup, which takes away what it left, sees pins of eBPF.
#[test]
fn file_system_of_ebpf_is_where_the_fast_path_is_and_where_it_is_cleaned_up() -> Result<()> {
    for (name, objects) in overlays()? {
        let daemons = if name == "cleanup" { "fabricd-cleanup" } else { "fabricd" };
        let pod = &object(&objects, "DaemonSet", daemons)?["spec"]["template"]["spec"];
        let expected = [("cleanup", "/sys/fs/bpf", false)];
        assert_eq!(mounts(pod, "bpffs"), expected[..usize::from(name == "cleanup")], "{name}");
    }
    for folder in ["etcd", "kubernetes-store"] {
        let objects = with_components(folder, &["fast-path"])?;
        let pod = &object(&objects, "DaemonSet", "fabricd")?["spec"]["template"]["spec"];
        assert_eq!(mounts(pod, "bpffs"), [("fabricd", "/sys/fs/bpf", false)], "{folder}");
    }
    Ok(())
}

/// Before the daemon translates the API server's own Service nobody does.
#[test]
fn without_kube_proxy_all_that_ask_the_api_server_have_its_own_address() -> Result<()> {
    for folder in ["etcd", "kubernetes-store"] {
        let objects = with_components(folder, &["services"])?;
        let told = &object(&objects, "ConfigMap", "fabric-api-server")?["data"];
        assert_eq!(told, &json!({"KUBERNETES_SERVICE_HOST": "192.0.2.1", "KUBERNETES_SERVICE_PORT": "6443"}));
        let asking = objects.iter().filter(|object| ["DaemonSet", "Job"].iter().any(|kind| object["kind"] == *kind));
        // The Job that writes the network config speaks to etcd alone.
        let asking = asking.filter(|object| object["metadata"]["name"] != "fabric-network");
        for object in asking {
            let from = &object["spec"]["template"]["spec"]["containers"][0]["envFrom"];
            let last = from.as_array().and_then(|from| from.last());
            assert_eq!(last, Some(&json!({"configMapRef": {"name": "fabric-api-server"}})), "{folder}: {object}");
        }
    }
    Ok(())
}

/// What doctor and explain print, run on the manifest as it is when somebody has switched masquerade off.
#[test]
fn printed_commands_switch_masquerade_on_in_what_is_installed() -> Result<()> {
    let mut commands = MASQUERADE_IN_KUBERNETES.lines();
    let (patch, restart) = (commands.next().context("a patch")?, commands.next().context("a restart")?);
    for file in ["fabricd-etcd.yaml", "fabricd-kubernetes.yaml"] {
        let objects: Vec<Value> = serde_saphyr::from_multiple(&std::fs::read_to_string(deploy().join(file))?)?;
        let mut off = object(&objects, "ConfigMap", "fabricd")?.clone();
        off["data"]["FABRICD_IP_MASQ"] = "false".into();
        let folder = tempfile::tempdir()?;
        let before = folder.path().join("configmap.json");
        std::fs::write(&before, off.to_string())?;
        // The file stands in the place of the object that an API server has.
        let local = format!("--local --filename {} --output json", before.display());
        let patch = patch.replace("patch configmap fabricd", &format!("patch {local}"));
        let after: Value = serde_json::from_str(&output(Command::new("sh").args(["-c", &patch]))?)?;
        ensure!(after["data"]["FABRICD_IP_MASQ"] == "true", "{file}: {after}");
        let namespace = &off["metadata"]["namespace"];
        ensure!(namespace == "fabric-system" && restart.contains("-n fabric-system "), "{file}: {restart}");
        object(&objects, "DaemonSet", "fabricd")?;
    }
    ensure!(restart.ends_with("rollout restart daemonset/fabricd"), "{restart}");
    Ok(())
}
