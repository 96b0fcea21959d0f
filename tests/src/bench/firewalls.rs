//! What the firewalls of others cost the daemon, which reads and judges them: thousands of chains beside it, while nobody
//! writes and while somebody writes a rule a second.

use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::report::ms;
use super::{Report, usage};
use crate::lab::{Lab, Node};

/// How it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Chains of others, each with a rule that leads to it.
    pub chains: u32,
    /// For how long each of the two is watched, in seconds, which is also how many rules are written.
    pub seconds: u32,
}

/// An audit looks at whatever no event has told of: every 10 s.
const SETTLED: Duration = Duration::from_secs(12);

/// Whose rules are like that, the table, and what fills it with so many chains.
type Ruleset = (&'static str, &'static str, fn(u32) -> String);

const RULESETS: [Ruleset; 2] =
    [("nat, like kube-proxy's", "nat", services), ("filter, like a policy engine's", "filter", policies)];

/// Measures.
///
/// # Errors
/// The lab breaks.
pub fn run(report: &mut Report, options: Options) -> Result<()> {
    let lab = Lab::builder().name("bench-firewalls").start()?;
    let node = lab.node("node-1")?;
    node.add_pod("a")?;
    for (title, table, ruleset) in RULESETS {
        let section = format!("{} chains of others in {title}", options.chains);
        node.command(&["nft", "-f", "-"])?.stdin(ruleset(options.chains)).run()?;
        sleep(SETTLED);
        let share = |cpu: Duration| ms(cpu) / f64::from(options.seconds) / 10.0;
        let rest = cpu_of(node, options.seconds, |_| Ok(()))?;
        report.number(&section, "nobody writes: CPU, of one core", "%", share(rest));
        let busy = cpu_of(node, options.seconds, |number| {
            // At the place that every packet passes first.
            node.run(&["nft", "insert", "rule", "ip", table, "FIRST", "counter", "comment", &format!("\"{number}\"")])
                .map(drop)
        })?;
        report.number(&section, "a rule a second: CPU, of one core", "%", share(busy));
        let one = ms(busy.saturating_sub(rest)) / f64::from(options.seconds);
        report.number(&section, "a rule a second: CPU for one", "ms", one);
        let (resident, peak) = usage::resident(&node.running_service("fabricd")?)?;
        report.number(&section, "resident", "MiB", resident);
        report.number(&section, "resident, at its most since the start", "MiB", peak);
        node.run(&["nft", "delete", "table", "ip", table])?;
    }
    lab.destroy()
}

/// CPU time of the daemon in so many seconds, in each of which something is done.
fn cpu_of(node: &Node, seconds: u32, each: impl Fn(u32) -> Result<()>) -> Result<Duration> {
    let process = node.running_service("fabricd")?;
    let (cpu, began) = (usage::cpu(&process)?, Instant::now());
    for number in 1..=seconds {
        each(number)?;
        sleep((Duration::from_secs(1) * number).saturating_sub(began.elapsed()));
    }
    Ok(usage::cpu(&process)? - cpu)
}

/// An address for each number.
fn address(prefix: &str, number: u32) -> String {
    format!("{prefix}.{}.{}", number >> 8 & 255, number & 255)
}

/// Services of one endpoint each: a chain for the Service and one for the endpoint.
fn services(chains: u32) -> String {
    let mut rules = "table ip nat {\n".to_owned();
    let mut first = "chain FIRST {\ntype nat hook prerouting priority -100;\n".to_owned();
    for number in 0..chains / 2 {
        let _ =
            writeln!(rules, "chain SEP-{number} {{\nmeta l4proto tcp dnat to {}:8080\n}}", address("10.201", number));
        let _ = writeln!(rules, "chain SVC-{number} {{\njump SEP-{number}\n}}");
        let _ = writeln!(first, "ip daddr {} tcp dport 80 jump SVC-{number}", address("10.96", number));
    }
    rules + &first + "}\n}\n"
}

/// A chain for each of the pods that some engine knows, tried one after the other.
fn policies(chains: u32) -> String {
    let mut rules = "table ip filter {\n".to_owned();
    let mut first = "chain FIRST {\ntype filter hook forward priority 0;\n".to_owned();
    for number in 0..chains {
        let _ = writeln!(rules, "chain POD-{number} {{\nip saddr {} accept\n}}", address("10.202", number));
        let _ = writeln!(first, "ip daddr {} jump POD-{number}", address("10.203", number));
    }
    rules + &first + "}\n}\n"
}
