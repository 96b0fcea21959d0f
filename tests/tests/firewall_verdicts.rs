//! The evaluator of foreign firewalls against the kernel: random chains are loaded, packets really sent, and what became
//! of them compared with the verdict. `FIREWALL_CASES=1000` tries more, `FIREWALL_SEED=7` others.
//!
//! ```text
//!  namespace a                 the kernel in question                  namespace b
//!  10.64.1.2 ── cni0 10.64.1.1 ─────── forwards ─────── fabric.1 10.64.2.1 ── 10.64.2.2
//! ```

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use fabric_core::firewall::packet::Content;
use fabric_core::firewall::{Connection, Interface, Packet, Path, Unknown, Verdict, evaluate};
use fabric_core::model::{Family, Subnet};
use fabric_tests::conformance::kernel::{look, v};
use fabric_tests::netns::{in_netns_async, ip, run};
use fabricd::kernel::netlink::Netlink;
use fabricd::kernel::{Kernel as _, Options};
use nix::sched::{CloneFlags, unshare};

/// UDP ports: of the sender, of the host, of the other side.
const FROM: u16 = 40_001;
const HOST: u16 = 8472;
const FAR: u16 = 50_001;
/// How often a packet that should arrive is sent, how long each may take, and how long one is waited for that shouldn't.
const TIMES: usize = 5;
const ARRIVES: Duration = Duration::from_secs(2);
const DROPPED: Duration = Duration::from_millis(15);

/// A link to a namespace of its own: its addresses by family, with the gateway's.
struct Side {
    link: &'static str,
    mac: &'static str,
    gateway_mac: &'static str,
    addresses: [(&'static str, &'static str); 2],
    port: u16,
}

const A: Side = Side {
    link: "cni0",
    mac: "02:00:00:00:01:02",
    gateway_mac: "02:00:00:00:01:01",
    addresses: [("10.64.1.2", "10.64.1.1"), ("2001:db8:1::2", "2001:db8:1::1")],
    port: FROM,
};
const B: Side = Side {
    link: "fabric.1",
    mac: "02:00:00:00:02:02",
    gateway_mac: "02:00:00:00:02:01",
    addresses: [("10.64.2.2", "10.64.2.1"), ("2001:db8:2::2", "2001:db8:2::1")],
    port: FAR,
};

impl Side {
    /// Makes the link and what is at its other end. Neighbours are fixed, since their discovery passes the chains too.
    /// Gives a socket there for each family.
    fn make(&self) -> [UdpSocket; 2] {
        let Self { link, mac, gateway_mac, .. } = self;
        ip(&format!("link add {link} address {gateway_mac} type veth peer name far address {mac}"));
        let (tell_thread, thread) = mpsc::channel();
        let (moved, is_moved) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let far = scope.spawn(move || {
                unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own; is this root?");
                tell_thread.send(nix::unistd::gettid()).expect("somebody waits");
                is_moved.recv().expect("the link comes");
                ip("link set far up");
                self.addresses.map(|(own, gateway)| {
                    let length = if own.contains(':') { "64 nodad" } else { "24" };
                    ip(&format!("address add {own}/{length} dev far"));
                    ip(&format!("neighbour add {gateway} lladdr {gateway_mac} dev far nud permanent"));
                    ip(&format!("route add default via {gateway} dev far"));
                    bound(own, self.port)
                })
            });
            ip(&format!("link set far netns {}", thread.recv().expect("it has begun")));
            moved.send(()).expect("it waits");
            let sockets = far.join().expect("the other side is made");
            ip(&format!("link set {link} up"));
            for (far, own) in self.addresses {
                let length = if own.contains(':') { "64 nodad" } else { "24" };
                ip(&format!("address add {own}/{length} dev {link}"));
                ip(&format!("neighbour add {far} lladdr {mac} dev {link} nud permanent"));
            }
            sockets
        })
    }

    fn far(&self, family: Family) -> &'static str {
        self.addresses[usize::from(family == Family::V6)].0
    }

    fn near(&self, family: Family) -> &'static str {
        self.addresses[usize::from(family == Family::V6)].1
    }
}

fn bound(ip: &str, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind(SocketAddr::new(v::<IpAddr>(ip), port)).expect("an address of this namespace");
    socket.set_nonblocking(true).expect("a socket");
    socket
}

/// All that sends and receives.
struct World {
    a: [UdpSocket; 2],
    b: [UdpSocket; 2],
    /// The host's sockets: towards a on the host's port, towards b.
    host: [[UdpSocket; 2]; 2],
    kernel: Netlink,
    /// Both links, as rules see them.
    links: [Interface; 2],
    sent: u64,
}

const PATHS: [Path; 3] = [Path::Received, Path::Forwarded, Path::Sent];

impl World {
    fn new() -> Self {
        run("sysctl", "-q -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let (a, b) = (A.make(), B.make());
        let host = [(&A, HOST), (&B, FROM)].map(|(side, port)| side.addresses.map(|(_, near)| bound(near, port)));
        let links = [A.link, B.link].map(|name| {
            let index = ip(&format!("-o link show {name}"));
            let index = index.split(':').next().and_then(|index| index.parse().ok());
            Interface { name: v(name), index, kind: Some("veth") }
        });
        Self { a, b, host, kernel: Netlink::new(Options::default()).expect("netlink opens"), links, sent: 0 }
    }

    /// Sends a packet, and tells whether it arrives; of one that should not the wait is short.
    fn arrives(&mut self, family: Family, path: Path, expected: bool) -> bool {
        let number = usize::from(family == Family::V6);
        let (from, to, at) = match path {
            Path::Received => (&self.a[number], &self.host[0][number], (A.near(family), HOST)),
            Path::Forwarded => (&self.a[number], &self.b[number], (B.far(family), FAR)),
            Path::Sent => (&self.host[1][number], &self.b[number], (B.far(family), FAR)),
        };
        let (times, patience) = if expected { (TIMES, ARRIVES) } else { (1, DROPPED) };
        // A queue that is full loses a packet, a rule drops it each time.
        (0..times).any(|_| {
            self.sent += 1;
            let content = self.sent.to_be_bytes();
            // A local firewall may refuse at once.
            let _ = from.send_to(&content, (v::<IpAddr>(at.0), at.1));
            let end = Instant::now() + patience;
            let mut buffer = [0; 8];
            while Instant::now() < end {
                match to.recv(&mut buffer) {
                    Ok(_) if buffer == content => return true,
                    Ok(_) => {}
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
            false
        })
    }

    /// Compares what the kernel does with what is said of it; gives how many verdicts were open, and those that differ.
    async fn compare(&mut self, rules: &str) -> (usize, Vec<String>) {
        self.kernel.audit();
        let firewall = look(&mut self.kernel).await.firewall.clone();
        let (mut open, mut wrong) = (0, vec![]);
        for family in Family::ALL {
            for path in PATHS {
                let verdict = evaluate(&firewall, &packet(family, path, self.links));
                let said = match &verdict {
                    Verdict::Passes => true,
                    Verdict::Dropped(_) => false,
                    Verdict::Unknown(doubts) => {
                        open += 1;
                        let unforeseen = doubts.iter().find(|doubt| !may_be_open(&doubt.because));
                        let told = unforeseen.map(|doubt| format!("{family} {path:?}, open by {doubt:?}\n{rules}"));
                        wrong.extend(told);
                        continue;
                    }
                };
                let did = self.arrives(family, path, said);
                if did != said {
                    wrong.push(format!("{family} {path:?}, evaluated: {verdict:?}\n{rules}"));
                }
            }
        }
        (open, wrong)
    }
}

/// Whether it can't be read off rules: a limit, the type of the input interface on the way out, and by which chain of a
/// priority a mark or tracking is changed first.
fn may_be_open(because: &Unknown) -> bool {
    let words = because.to_string();
    let known = ["meta mark", "notrack", "iiftype"];
    known.contains(&words.as_str()) || words.contains("limit") || words.contains("order of chains")
}

fn packet(family: Family, path: Path, [a, b]: [Interface; 2]) -> Packet {
    let (source, target) = match path {
        Path::Received => (A.far(family), A.near(family)),
        Path::Forwarded => (A.far(family), B.far(family)),
        Path::Sent => (B.near(family), B.far(family)),
    };
    Packet {
        source: Subnet::host(v(source)),
        target: Subnet::host(v(target)),
        content: Content::Udp { from: FROM, to: if path == Path::Received { HOST } else { FAR } },
        path,
        input: (path != Path::Sent).then_some(a),
        output: (path != Path::Received).then_some(b),
        connection: Connection::New,
        reverse_path: Some(true),
    }
}

/// A choice of texts.
fn one<'a>(random: &mut fastrand::Rng, texts: &[&'a str]) -> &'a str {
    texts[random.usize(..texts.len())]
}

/// Conditions in the words of nft, for IPv4 and (with other addresses) IPv6.
fn nft_condition(random: &mut fastrand::Rng, ip: bool, ip6: bool) -> String {
    let v4 = [
        "ip saddr 10.64.1.2",
        "ip saddr 10.64.1.0/24",
        "ip saddr != 10.64.0.0/16",
        "ip saddr 10.64.1.1-10.64.1.9",
        "ip daddr { 10.64.2.0/24, 192.0.2.7 }",
        "ip daddr != { 10.64.2.2, 10.64.1.1 }",
        "ip daddr . udp dport { 10.64.2.2 . 50001, 10.64.1.1 . 99 }",
        "ip saddr . ip daddr { 10.64.1.0/24 . 10.64.2.0-10.64.2.9 }",
        "ip protocol udp",
        "ip saddr & 255.255.0.255 == 10.64.0.2",
        "ip frag-off & 0x1fff == 0",
    ];
    let v6 = [
        "ip6 saddr 2001:db8:1::2",
        "ip6 saddr 2001:db8:1::/64",
        "ip6 daddr != 2001:db8:2::/48",
        "ip6 daddr { 2001:db8:2::2-2001:db8:2::9, 2001:db8:9::/64 }",
        "ip6 saddr . meta l4proto { 2001:db8:1::2 . udp }",
        "ip6 nexthdr udp",
        "exthdr frag exists",
    ];
    let any = [
        "meta l4proto udp",
        "meta l4proto != { icmp, ipv6-icmp, tcp }",
        "udp dport 8472",
        "udp dport 50001",
        "udp dport != 50001",
        "udp dport 8000-9000",
        "udp sport { 40001, 53 }",
        "udp dport { 1-9000, 60000-65535 }",
        "tcp dport 50001",
        "iifname \"cni0\"",
        "iifname != \"cni*\"",
        "iifname \"fab*\"",
        "oifname \"fabric.1\"",
        "oifname { \"cni0\", \"eth0\" }",
        "iif \"lo\"",
        "ct state new",
        "ct state established,related",
        "ct state { new, untracked }",
        "ct state invalid",
        "ct status dnat",
        "meta mark 0x1",
        "meta mark & 0x6 == 0x2",
        "meta mark != 0x3",
        "meta pkttype host",
        "meta pkttype { broadcast, multicast }",
        "fib daddr type local",
        "fib saddr type != local",
        "meta nfproto ipv4",
        "limit rate 1000000/second",
    ];
    match random.u8(..4) {
        0 if ip => one(random, &v4).to_owned(),
        1 if ip6 => one(random, &v6).to_owned(),
        _ => one(random, &any).to_owned(),
    }
}

/// A rule of nftables: conditions, maybe a mark, and a verdict.
fn nft_rule(random: &mut fastrand::Rng, family: &str, hook: Option<&str>, targets: &[&str]) -> String {
    let of_v6 = random.bool();
    let (ip, ip6) = (family != "ip6" && !of_v6, family != "ip" && of_v6);
    let mut words: Vec<String> = (0..random.usize(..3)).map(|_| nft_condition(random, ip, ip6)).collect();
    let early = matches!(hook, Some("prerouting" | "output"));
    let mut verdicts =
        vec!["accept", "accept", "drop", "drop", "return", "counter", "meta mark set 0x1", "meta mark set 0x3"];
    verdicts.extend(targets);
    if matches!(hook, Some("input" | "forward" | "output")) {
        verdicts.push("reject");
    }
    if early {
        verdicts.push("notrack");
    }
    let map =
        targets.first().map(|target| format!("udp dport vmap {{ 8472 : drop, 50001 : {target}, 1-99 : accept }}"));
    words.push(match map {
        Some(map) if random.u8(..8) == 0 => map,
        _ => one(random, &verdicts).to_owned(),
    });
    words.join(" ")
}

fn nft_ruleset(random: &mut fastrand::Rng) -> String {
    let mut text = String::new();
    for number in 0..random.usize(1..4) {
        let family = one(random, &["inet", "inet", "ip", "ip6"]);
        text += &format!("table {family} t{number} {{\n");
        for (chain, targets) in [("second", &[][..]), ("first", &["jump second", "goto second"])] {
            text += &format!(" chain {chain} {{\n");
            (0..random.usize(..4)).for_each(|_| text += &format!("  {}\n", nft_rule(random, family, None, targets)));
            text += " }\n";
        }
        for base in 0..random.usize(1..4) {
            let hook = one(random, &["prerouting", "input", "forward", "forward", "output", "postrouting"]);
            let priority = one(random, &["-310", "-150", "0", "5", "10"]);
            let policy = one(random, &["accept", "accept", "drop"]);
            text += &format!(" chain base{base} {{\n  type filter hook {hook} priority {priority}; policy {policy};\n");
            let targets = ["jump first", "goto first", "jump second"];
            (0..random.usize(..5))
                .for_each(|_| text += &format!("  {}\n", nft_rule(random, family, Some(hook), &targets)));
            text += " }\n";
        }
        text += "}\n";
    }
    text
}

/// What `iptables-restore` reads.
fn iptables_ruleset(random: &mut fastrand::Rng, family: Family) -> String {
    let v4 = [
        "-s 10.64.1.2/32",
        "! -s 10.64.1.0/24",
        "-d 10.64.2.0/24",
        "-m iprange --src-range 10.64.1.1-10.64.1.5",
        "-m iprange ! --dst-range 10.64.2.2-10.64.2.3",
        "! -f",
    ];
    let v6 = ["-s 2001:db8:1::2/128", "! -d 2001:db8:2::/64", "-m iprange --dst-range 2001:db8:2::1-2001:db8:2::2"];
    let any = [
        "-i cni0",
        "-i cni+",
        "! -i fab+",
        "-o fabric.1",
        "! -o eth0",
        "-p udp",
        "! -p tcp",
        "-p udp -m udp --dport 8472",
        "-p udp -m udp ! --dport 50001",
        "-p udp -m udp --sport 40000:41000",
        "-p udp -m multiport --dports 53,8000:9000",
        "-p udp -m multiport ! --dports 50001",
        "-p udp -m multiport --ports 40001",
        "-p tcp -m tcp --dport 50001 --tcp-flags SYN,ACK SYN",
        "-m conntrack --ctstate NEW",
        "-m conntrack --ctstate RELATED,ESTABLISHED",
        "-m conntrack ! --ctstate NEW,UNTRACKED",
        "-m conntrack --ctstate INVALID",
        "-m state --state NEW",
        "-m mark --mark 0x1",
        "-m mark ! --mark 0x2/0x6",
        "-m addrtype --dst-type LOCAL",
        "-m addrtype ! --src-type LOCAL",
        "-m pkttype --pkt-type unicast",
        "-m comment --comment said",
        "-m limit --limit 10000/sec",
    ];
    let mut text = String::new();
    for (table, chains) in [
        ("raw", &["PREROUTING", "OUTPUT"][..]),
        ("mangle", &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"]),
        ("filter", &["INPUT", "FORWARD", "OUTPUT"]),
    ] {
        if table != "filter" && random.bool() {
            continue;
        }
        text += &format!("*{table}\n");
        for chain in chains {
            text += &format!(":{chain} {} [0:0]\n", one(random, &["ACCEPT", "ACCEPT", "ACCEPT", "DROP"]));
        }
        text += ":first - [0:0]\n:second - [0:0]\n";
        let mut rules = |chain: &str, targets: &[&str], most| {
            for _ in 0..random.usize(..most) {
                let conditions = (0..random.usize(..3)).map(|_| match (random.u8(..4), family) {
                    (0, Family::V4) => one(random, &v4),
                    (0, Family::V6) => one(random, &v6),
                    _ => one(random, &any),
                });
                let mut seen: Vec<&str> = vec![];
                // An option is given once, and only where packets have such an interface.
                let misplaced = |text: &str| match chain {
                    "INPUT" | "PREROUTING" => text.contains("-o "),
                    "OUTPUT" | "POSTROUTING" => text.contains("-i "),
                    _ => false,
                };
                for condition in conditions {
                    let key = |text: &str| text.trim_start_matches("! ").chars().take(2).collect::<String>();
                    let match_of =
                        |text: &str| text.split("-m ").nth(1).map(|m| m.split(' ').next().unwrap_or("").to_owned());
                    let clashes = seen.iter().any(|other| {
                        (key(other) == key(condition) && !condition.starts_with("-m"))
                            || match_of(other).is_some() && match_of(other) == match_of(condition)
                    });
                    if !clashes && !misplaced(condition) {
                        seen.push(condition);
                    }
                }
                let mut verdicts = vec!["-j ACCEPT", "-j ACCEPT", "-j DROP", "-j DROP", "-j RETURN", ""];
                verdicts.extend(targets);
                match table {
                    "filter" => verdicts.push("-j REJECT"),
                    "mangle" => verdicts.extend(["-j MARK --set-mark 0x1", "-j MARK --set-xmark 0x2/0x6"]),
                    _ => verdicts.push("-j CT --notrack"),
                }
                text += &format!("-A {chain} {} {}\n", seen.join(" "), one(random, &verdicts));
            }
        };
        rules("second", &[], 4);
        rules("first", &["-j second", "-g second"], 4);
        for chain in chains {
            rules(chain, &["-j first", "-g first", "-j second"], 4);
        }
        text += "COMMIT\n";
    }
    text
}

/// Loads what a program reads from its input; false for rules that contradict themselves, which it refuses.
fn load(program: &str, text: &str) -> bool {
    use std::io::Write as _;
    // Others may hold the lock of iptables-legacy, which all namespaces share.
    let arguments: &[&str] = if program == "nft" { &["-f", "-"] } else { &["--wait"] };
    let mut child = std::process::Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect(program);
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it ends").status.success()
}

fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Tries random rules of one kind: made by `rules`, taken away by `flush`.
fn try_many(
    cases: u64,
    make: impl Fn(&mut fastrand::Rng) -> Vec<(&'static str, String)> + Send,
    flush: impl Fn() + Send,
) {
    in_netns_async(|| async move {
        let mut world = World::new();
        for (family, path) in Family::ALL.into_iter().flat_map(|family| PATHS.map(|path| (family, path))) {
            assert!(world.arrives(family, path, true), "{family} {path:?} without any rules");
        }
        let first = number("FIREWALL_SEED", 1);
        let (mut open, mut wrong, mut tried, cases) = (0, vec![], 0, number("FIREWALL_CASES", cases));
        for seed in first..first + 20 * cases {
            if tried == cases {
                break;
            }
            let rules = make(&mut fastrand::Rng::with_seed(seed));
            if !rules.iter().all(|(program, text)| load(program, text)) {
                flush();
                continue;
            }
            tried += 1;
            let text: Vec<&str> = rules.iter().map(|(_, text)| text.as_str()).collect();
            let text = format!("seed {seed}:\n{}", text.join("\n"));
            let (undecided, differ) = world.compare(&text).await;
            open += undecided;
            wrong.extend(differ);
            flush();
        }
        println!("{tried} cases from seed {first}: {open} verdicts were open, {} wrong", wrong.len());
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert_eq!(tried, cases, "nearly all rules were refused");
    });
}

#[test]
fn interfaces_at_each_hook_are_those_that_the_kernel_shows() {
    in_netns_async(|| async {
        let mut world = World::new();
        let hooks = ["prerouting", "input", "forward", "output", "postrouting"];
        let conditions = ["iifname", "oifname"].map(|key| [A.link, B.link].map(|link| format!("{key} \"{link}\"")));
        let mut conditions = conditions.concat();
        conditions.extend(["iif 0", "oif 0", "iiftype ether", "oiftype ether"].map(str::to_owned));
        let mut wrong = vec![];
        for hook in hooks {
            for condition in &conditions {
                let chain = format!(
                    "table inet t {{\n chain c {{\n  type filter hook {hook} priority 0\n  {condition} drop\n }}\n}}\n"
                );
                assert!(load("nft", &chain), "{chain}");
                let (open, wrong_here) = world.compare(&chain).await;
                wrong.extend(wrong_here);
                let is_open = condition.starts_with("iiftype") && ["output", "postrouting"].contains(&hook);
                assert_eq!(open > 0, is_open, "{chain}");
                run("nft", "flush ruleset");
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}

#[test]
fn verdicts_on_random_nftables_chains_are_the_kernels() {
    try_many(80, |random| vec![("nft", nft_ruleset(random))], || drop(run("nft", "flush ruleset")));
}

#[test]
fn verdicts_on_random_iptables_nft_rules_are_the_kernels() {
    let make = |random: &mut fastrand::Rng| {
        vec![
            ("iptables-nft-restore", iptables_ruleset(random, Family::V4)),
            ("ip6tables-nft-restore", iptables_ruleset(random, Family::V6)),
        ]
    };
    try_many(40, make, || drop(run("nft", "flush ruleset")));
}

#[test]
fn verdicts_on_random_iptables_legacy_rules_are_the_kernels() {
    let make = |random: &mut fastrand::Rng| {
        vec![
            ("iptables-legacy-restore", iptables_ruleset(random, Family::V4)),
            ("ip6tables-legacy-restore", iptables_ruleset(random, Family::V6)),
        ]
    };
    let flush = || {
        let empty = |table: &str, chains: &[&str]| {
            let chains: String = chains.iter().map(|chain| format!(":{chain} ACCEPT [0:0]\n")).collect();
            format!("*{table}\n{chains}COMMIT\n")
        };
        let all = empty("raw", &["PREROUTING", "OUTPUT"])
            + &empty("mangle", &["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"])
            + &empty("filter", &["INPUT", "FORWARD", "OUTPUT"]);
        for program in ["iptables-legacy-restore", "ip6tables-legacy-restore"] {
            assert!(load(program, &all), "{program}");
        }
    };
    try_many(40, make, flush);
}
