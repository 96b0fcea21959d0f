//! Policies and the fast path: its programs bypass the packet filter, so there is none.

use std::thread;

use anyhow::{Result, ensure};
use fabric_core::policy::Conn;
use fabric_tests::lab::{Pod, wait_until};
use fabric_tests::policies::{NAMESPACES, namespace, policies_of, policy};
use serde_json::json;

use crate::{Cluster, Open, PORTS, SOON, Server, connects};

#[test]
fn an_isolated_pod_is_never_on_the_fast_path() -> Result<()> {
    let cluster = Cluster::start(2)?;
    cluster.api.create(NAMESPACES, namespace("x", &json!({})));
    let nodes = [(&cluster.nodes[0], "--fast-path=on"), (&cluster.nodes[1], "--fast-path=auto")];
    for (node, flag) in nodes {
        node.start_fabricd_with(&[flag], &[])?;
    }
    let add = |node: usize, name: &str| cluster.add_pod(&cluster.nodes[node], "x", name);
    let (shut, near, far) = (add(0, "shut")?, add(0, "near")?, add(1, "far")?);
    for ((node, _), addresses) in nodes.into_iter().zip([4, 2]) {
        wait_until("all pods and the other node on the fast path", SOON, || {
            let status = node.status()?;
            let fast = &status["fast_path"];
            ensure!(fast["on"] == true && fast["pods"] == addresses && fast["peers"] == 1, "{fast}");
            Ok(())
        })?;
    }
    // It sends, and it is sent to; on its own node, and from another one.
    let forbidden = [(&shut, &far), (&far, &shut), (&shut, &near), (&near, &shut)];
    let all = |pairs: &[(&Pod, &Pod)]| -> Result<Vec<(String, Open)>> {
        let ends = pairs.iter().flat_map(|(from, to)| [0, 1].map(|at| (*from, *to, at)));
        let name = |from: &Pod, to: &Pod, at: usize| format!("{} to {}, {}", from.name(), to.name(), to.ips()[at]);
        ends.map(|(from, to, at)| Ok((name(from, to, at), Open::between(from, to, at)?))).collect()
    };
    let (mut cut, mut kept) = (all(&forbidden)?, all(&[(&near, &far), (&far, &near)])?);
    let are = |opened: &mut [(String, Open)], arrive: bool, when: &str| {
        opened.iter_mut().try_for_each(|(name, open)| {
            wait_until(&format!("{name}, {when}"), SOON, || {
                ensure!(open.arrives()? == arrive, "arrives: {}", !arrive);
                Ok(())
            })
        })
    };
    are(&mut cut, true, "fast")?;
    are(&mut kept, true, "fast")?;
    wait_until("packets of all these connections on the fast path", SOON, || {
        // Five at least of each: opened, said and heard, in both families.
        for ((node, _), least) in nodes.into_iter().zip([60, 40]) {
            let fast = &node.status()?["fast_path"]["fast_packets"];
            let packets = fast.as_u64().or_else(|| fast.as_str()?.parse().ok()).unwrap_or_default();
            ensure!(packets >= least, "{packets} on {}", node.name);
        }
        Ok(())
    })?;

    let nothing = || {
        policy(
            "x",
            "shut",
            &json!({
                "podSelector": {"matchLabels": {"pod": "shut"}}, "policyTypes": ["Ingress", "Egress"],
            }),
        )
    };
    cluster.api.create(&policies_of("x"), nothing());
    for (node, flag) in nodes {
        node.kill_fabricd()?;
        cluster.start_fabricd_with(node, &[flag])?;
        let pins = node.exec(&["ls", "-R", "/sys/fs/bpf/fabric"])?;
        assert!(!pins.success(), "{}: {}", node.name, pins.stdout);
        let fast = node.status()?["fast_path"].clone();
        let reason = fast["reason"].as_str().unwrap_or_default();
        assert!(fast["on"] != true && reason.contains("NetworkPolicies are enforced here"), "{fast}");
    }
    // New ones, all at once: each that is refused takes its whole time.
    let refused = || {
        let ends = forbidden.iter().flat_map(|(from, to)| [6, 17].map(|protocol| (*from, *to, protocol)));
        let reaches: Vec<Result<bool>> = thread::scope(|scope| {
            let probe = |(from, to, protocol): (&Pod, &Pod, u8)| {
                let conn = Conn { src: from.ips()[0], dst: to.ips()[0], protocol, port: PORTS[0] };
                let from = from.clone();
                scope.spawn(move || connects(&from, &conn))
            };
            let probes: Vec<_> = ends.map(probe).collect();
            probes.into_iter().map(|probe| probe.join().expect("a probe does not panic")).collect()
        });
        let reaches = reaches.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(!reaches.contains(&true), "{reaches:?}");
        Ok(())
    };
    let _servers = [&shut, &near, &far].map(Server::start).into_iter().collect::<Result<Vec<_>>>()?;
    are(&mut cut, false, "which was fast when the policy came")?;
    are(&mut kept, true, "which no policy forbids")?;
    refused()?;
    cluster.api.delete(&policies_of("x"), "shut");
    are(&mut cut, true, "without the policy")?;
    cluster.api.create(&policies_of("x"), nothing());
    are(&mut cut, false, "with the policy again")?;
    are(&mut kept, true, "all the time")?;
    refused()
}
