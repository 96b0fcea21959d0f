//! The page in a real browser, served by the daemon's own code on what a test publishes: three nodes, fifty, five hundred.
//! `target/tmp/page-*.png` show what the browser made of it.

use std::fmt::Display;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::model::{Family, Vni};
use fabric_tests::browser::Browser;
use fabric_tests::certificates::Certificates;
use fabric_tests::lab::wait_until;
use fabric_tests::served::{Served, key, view};
use fabricd::api::{self, Remote, Tls};
use fabricd::http;
use fabricd::mesh::probe::Answer;
use fabricd::mesh::verdict::Seen;
use fabricd::mesh::{LocalVtep, Mesh, Path, Target};
use fabricd::metrics::Metrics;
use fabricd::status::counters::Counters;
use fabricd::status::events::Kind;
use fabricd::status::view::{PeerTrouble, View};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(120);

/// A daemon whose page is open in a browser.
struct Open {
    daemon: Served,
    server: JoinHandle<()>,
    browser: Browser,
    runtime: Runtime,
    /// Read at each connection.
    _certificates: Certificates,
}

impl Open {
    /// `node-1` of so many nodes, which all can be asked but the last.
    fn of(nodes: u16) -> Result<Self> {
        let runtime = Runtime::new()?;
        let inside = runtime.enter();
        let others: Vec<u16> = (2..=nodes).collect();
        let mut daemon = Served::new(view(&others)?, mesh(&others)?)?;
        let names: Vec<String> = (1..nodes).map(|node| format!("DNS:node-{node}")).collect();
        let certificates = Certificates::create_for(&[("all", &names.join(","))])?;
        let (certificate, key) = certificates.pair("all");
        let tls = Tls::new(&certificates.ca(), &certificate, &key);
        let listener = runtime.block_on(TcpListener::bind("0.0.0.0:0"))?;
        daemon.sources.remote = Remote { access: Some((tls.clone(), listener.local_addr()?.port())) };
        let sources = daemon.sources.clone();
        runtime.spawn(async move { api::serve_tls(listener, tls, sources).await });

        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address: SocketAddr = listener.local_addr()?;
        let sources = daemon.sources.clone();
        let server = runtime.spawn(async move {
            let _ = http::serve(listener, sources, Arc::new(Metrics::new(&Counters::default()))).await;
        });
        let mut browser = Browser::open(1280, 1600)?;
        browser.visit(&format!("http://{address}/"))?;
        drop(inside);
        Ok(Self { daemon, server, browser, runtime, _certificates: certificates })
    }

    fn publish(&self, change: impl FnOnce(&mut View)) {
        self.daemon.view.send_modify(|view| change(Arc::make_mut(view)));
    }

    /// Waits until an expression of JavaScript is true.
    fn wait(&mut self, expression: &str) -> Result<()> {
        wait_until(expression, SOON, || {
            ensure!(
                self.browser.eval(expression)? == true,
                "the page says: {}",
                self.browser.eval("document.body.innerText")?
            );
            Ok(())
        })
    }

    /// Waits until the element with this id says that.
    fn wait_for(&mut self, id: &str, text: &str) -> Result<()> {
        self.wait(&format!("document.getElementById('{id}').textContent.includes({})", serde_json::to_string(text)?))
    }

    fn keep_picture(&mut self, name: impl Display) -> Result<()> {
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("page-{name}.png"));
        let mut base64 =
            Command::new("base64").arg("-d").stdin(Stdio::piped()).stdout(std::fs::File::create(file)?).spawn()?;
        base64.stdin.take().context("a pipe")?.write_all(self.browser.picture()?.as_bytes())?;
        ensure!(base64.wait()?.success(), "the picture can't be kept");
        Ok(())
    }
}

/// All paths are fine, but large packets don't get to node-2.
fn mesh(others: &[u16]) -> Result<Mesh> {
    let view = view(others)?;
    let leases = view.leases.context("leases")?;
    let ours = Arc::new(LocalVtep {
        node: "node-1".parse()?,
        device: "fabric.1".parse()?,
        underlay: "eth0".parse()?,
        pod_bridges: ["cni0".parse()?].into(),
        overlay: "127.1.1.0".parse()?,
        mac: "02:42:00:00:00:01".parse()?,
        local: "198.18.0.1".parse()?,
        mtu: 1450,
        vni: Vni::try_from(1)?,
        port: 8472,
    });
    let path = |node: &u16| {
        let to = key(*node)?;
        let lease = leases.get(&to).context("a lease")?;
        let target = Target::new(lease, Family::V4, &ours).context("IPv4")?;
        let path = Path::new(target, Instant::now());
        let came = Answer::Daemon { rtt: Duration::from_micros(150), arrived: 0 };
        let path = match node {
            2 => path.after(came, Answer::Nothing, Seen::SmallOnly { largest: 1250, full: 1450 }),
            _ => path.after(came, came, Seen::Both),
        };
        Ok(((to, Family::V4), path))
    };
    others.iter().map(path).collect()
}

#[test]
fn page_shows_three_fifty_and_five_hundred_nodes() -> Result<()> {
    for nodes in [3, 50, 500_u16] {
        let mut page = Open::of(nodes)?;
        page.wait_for("facts", &format!("{0} of {0} programmed", nodes - 1))?;
        page.wait_for("state", "ready")?;
        // All nodes were asked; the last has no certificate. On a busy machine not each of hundreds answers every time.
        page.wait(&format!(
            "(window.answered ??= new Set(), page.mesh.rows.filter(row => !row.error).forEach(row => answered.add(row.node)),
                answered.size === {})",
            nodes - 1
        ))?;
        page.wait(&format!("document.querySelectorAll('#leases td.own, #leases tr').length >= {nodes}"))?;
        page.wait(&format!("document.querySelectorAll('#topology circle').length === {nodes}"))?;
        page.wait_for("bad", "packets of 1250 bytes come through")?;

        // Nothing sticks out of its place.
        page.wait("document.documentElement.scrollWidth <= window.innerWidth")?;
        page.wait(
            "(() => { const all = $('topology').getBoundingClientRect(); return [...$('topology').children].every(child => {
                const box = child.getBoundingClientRect();
                return box.left >= all.left && box.right <= all.right && box.top >= all.top && box.bottom <= all.bottom;
            }); })()",
        )?;
        // The pictures are as high as their peers need: few leave no empty half.
        if nodes == 3 {
            page.wait("['topology', 'heat'].every(id => $(id).getBoundingClientRect().height < 400)")?;
        }
        // Nothing came from elsewhere.
        page.wait("performance.getEntriesByType('resource').every(file => file.name.startsWith(location.origin))")?;
        page.wait("performance.getEntriesByType('resource').length >= 3")?;

        // A cell has the colour of its verdict, and says it when pointed at: how this node sees node-2.
        page.wait(
            "(() => { const heat = $('heat'), data = heat.getContext('2d').getImageData(0, 0, heat.width, heat.height).data;
                for (let at = 0; at < data.length; at += 4)
                    if (data[at] === 0xf0 && data[at + 1] === 0x8c && data[at + 2] === 0x2e) {
                        const scale = window.devicePixelRatio, box = heat.getBoundingClientRect();
                        const [x, y] = [(at / 4 % heat.width + 1) / scale, (Math.floor(at / 4 / heat.width) + 1) / scale];
                        heat.dispatchEvent(new PointerEvent('pointermove', { clientX: box.left + x, clientY: box.top + y }));
                        return true;
                    }
                return false; })()",
        )?;
        page.wait_for("cell", "node-1 → node-2: mtu_black_hole")?;
        for scheme in ["light", "dark"] {
            page.browser.prefer(scheme)?;
            page.browser.eval("show()")?;
            page.keep_picture(format_args!("{nodes}-{scheme}"))?;
        }
        let ground = page.browser.eval("getComputedStyle(document.body).backgroundColor")?;
        assert_eq!(ground, "rgb(15, 19, 23)", "a dark page for who prefers that");
    }
    Ok(())
}

#[test]
fn page_follows_what_happens_and_says_when_it_can_not() -> Result<()> {
    let mut page = Open::of(3)?;
    page.wait_for("state", "ready")?;
    page.daemon.sources.events.tell(Kind::Peer, "node-2", "went", false);
    page.wait_for("events", "node-2 went")?;

    let reason = "no lease: <img src=x>";
    page.publish(|view| {
        view.readiness = Readiness::NotReady { code: NotReady::Starting, reason: reason.into() };
        view.warnings = vec![reason.into()];
        let peer = view.peers().next().expect("there are two").key;
        view.troubles.insert(peer, PeerTrouble::Pending(reason.into()));
    });
    page.wait_for("state", "not ready")?;
    for id in ["reason", "warnings", "bad"] {
        page.wait_for(id, reason)?;
    }
    page.wait("document.querySelector('img') === null")?;

    page.browser.eval("$('filter').value = 'node-3'; $('filter').dispatchEvent(new Event('input'))")?;
    page.wait("document.querySelectorAll('#leases tr').length === 2")?;

    page.server.abort();
    page.runtime.shutdown_background();
    let Open { mut browser, .. } = page;
    wait_until("the page says that nobody answers", SOON, || {
        let said = browser.eval("document.body.className + $('age').textContent")?;
        ensure!(said.as_str().is_some_and(|said| said.contains("away") && said.contains("no answer")), "{said}");
        Ok(())
    })
}
