//! A real etcd of one or three members, in the underlay.
//!
//! Its data lies in memory, which outlives the members but not the lab: etcd waits for its disk at every
//! write, and how long other work keeps that busy is nothing a test of the fabric should hang on.

use std::sync::Arc;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::addresses::{self, Families};
use super::http;
use super::underlay::Underlay;
use super::wait::{DISK, wait_until};

/// The etcd cluster of a lab. Members are numbered from 1; each method that takes one acts on it alone.
#[derive(Debug)]
pub struct Etcd {
    underlay: Arc<Underlay>,
    families: Families,
    members: u16,
}

impl Etcd {
    pub(super) fn new(underlay: Arc<Underlay>, families: Families, members: u16) -> Self {
        Self { underlay, families, members }
    }

    /// The numbers of all members.
    pub fn members(&self) -> impl Iterator<Item = u16> + use<> {
        1..=self.members
    }

    /// All client URLs, separated by commas, as `--etcd-endpoints` wants them.
    #[must_use]
    pub fn endpoints(&self) -> String {
        let urls: Vec<String> = self.members().map(|member| self.url(member, 2379)).collect();
        urls.join(",")
    }

    /// Starts all members and waits until every one answers.
    ///
    /// # Errors
    /// One runs already, or doesn't answer in time: the error shows its log.
    pub fn start(&self) -> Result<()> {
        self.members().try_for_each(|member| self.start_member(member, &[]))?;
        self.members().try_for_each(|member| self.wait_healthy(member))
    }

    /// Starts one member, with more arguments such as `--quota-backend-bytes 1`; doesn't wait for it.
    ///
    /// # Errors
    /// It runs already or ended at once.
    pub fn start_member(&self, member: u16, args: &[&str]) -> Result<()> {
        let name = name(member);
        let (client, peer) = (self.url(member, 2379), self.url(member, 2380));
        let cluster: Vec<String> = self.members().map(|m| format!("{}={}", self::name(m), self.url(m, 2380))).collect();
        let data = self.data_dir(member);
        let cluster = cluster.join(",");
        let own = [
            ["--name", &name],
            ["--data-dir", &data],
            ["--listen-client-urls", &client],
            ["--advertise-client-urls", &client],
            ["--listen-peer-urls", &peer],
            ["--initial-advertise-peer-urls", &peer],
            ["--initial-cluster", &cluster],
            ["--logger", "zap"],
            ["--log-level", "warn"],
        ];
        self.underlay.machine.start_service(&name, &[&["etcd"], own.as_flattened(), args].concat(), &[])?;
        Ok(())
    }

    /// Waits until a member is part of a cluster with a leader.
    ///
    /// # Errors
    /// It doesn't become so in time: the error shows its log.
    pub fn wait_healthy(&self, member: u16) -> Result<()> {
        let address = (addresses::etcd(self.families.first(), member), 2379).into();
        wait_until("etcd is healthy", DISK, || {
            let reply = http::get(&self.underlay.machine.network()?, address, "/health")?;
            ensure!(reply.body.contains(r#""health":"true""#), "{}", reply.body);
            Ok(())
        })
        .map_err(|error| error.context(self.underlay.machine.log_tail(&name(member))))
    }

    /// Stops every running member in good order.
    ///
    /// # Errors
    /// A member doesn't end.
    pub fn stop(&self) -> Result<()> {
        self.running().try_for_each(|member| self.end_member(member, Signal::SIGTERM))
    }

    /// Kills every running member.
    ///
    /// # Errors
    /// A member doesn't end.
    pub fn kill(&self) -> Result<()> {
        self.running().try_for_each(|member| self.end_member(member, Signal::SIGKILL))
    }

    /// Ends one member by SIGTERM or SIGKILL.
    ///
    /// # Errors
    /// It doesn't run or doesn't end.
    pub fn end_member(&self, member: u16, signal: Signal) -> Result<()> {
        self.underlay.machine.end(&name(member), signal)
    }

    /// Stops the time of every running member: connections stay open, nothing answers.
    ///
    /// # Errors
    /// A member has ended meanwhile.
    pub fn freeze(&self) -> Result<()> {
        self.running().try_for_each(|member| self.underlay.machine.signal(&name(member), Signal::SIGSTOP))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// A member has ended meanwhile.
    pub fn thaw(&self) -> Result<()> {
        self.running().try_for_each(|member| self.underlay.machine.signal(&name(member), Signal::SIGCONT))
    }

    /// Where a member keeps its data, in the underlay's machine: removed for an empty new start.
    #[must_use]
    pub fn data_dir(&self, member: u16) -> String {
        format!("/run/{}", name(member))
    }

    /// Where a member answers.
    #[must_use]
    pub fn address(&self, member: u16) -> std::net::IpAddr {
        addresses::etcd(self.families.first(), member)
    }

    /// Empties a member that doesn't run.
    ///
    /// # Errors
    /// Its data can't be removed.
    pub fn wipe(&self, member: u16) -> Result<()> {
        self.underlay.machine.run(&["rm", "-rf", &self.data_dir(member)])?;
        Ok(())
    }

    /// Writes what the only member holds to a file in the underlay's machine.
    ///
    /// # Errors
    /// etcdctl failed.
    pub fn back_up(&self, file: &str) -> Result<()> {
        self.ctl(&["snapshot", "save", file])?;
        Ok(())
    }

    /// Puts such a file in the place of a member that doesn't run, and is the only one.
    ///
    /// # Errors
    /// etcdctl failed.
    pub fn restore(&self, member: u16, file: &str) -> Result<()> {
        self.wipe(member)?;
        let (name, peer, data) = (name(member), self.url(member, 2380), self.data_dir(member));
        let cluster = format!("{name}={peer}");
        let place = ["--name", &name, "--data-dir", &data, "--initial-cluster", &cluster];
        let argv = [&["etcdctl", "snapshot", "restore", file][..], &place, &["--initial-advertise-peer-urls", &peer]];
        self.underlay.machine.command(&argv.concat())?.env("ETCDCTL_API", "3").run()?;
        Ok(())
    }

    /// Runs `etcdctl` against all members and returns what it printed.
    ///
    /// # Errors
    /// It failed.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let endpoints = self.endpoints();
        let argv = [&["etcdctl", "--endpoints", endpoints.as_str()], args].concat();
        self.underlay.machine.command(&argv)?.env("ETCDCTL_API", "3").run()
    }

    fn running(&self) -> impl Iterator<Item = u16> {
        self.members().filter(|&member| self.underlay.machine.service(&name(member)).is_some())
    }

    fn url(&self, member: u16, port: u16) -> String {
        let address = addresses::etcd(self.families.first(), member);
        format!("http://{}", std::net::SocketAddr::from((address, port)))
    }
}

fn name(member: u16) -> String {
    format!("etcd-{member}")
}
