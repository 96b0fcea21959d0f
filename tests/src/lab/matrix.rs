//! Everybody pings everybody, and everybody tells whom he saw.
//!
//! Two questions for each pair of pods: do packets arrive (`ping`), and does the target see the pod's own
//! address as their source, so is there no NAT between them (a UDP packet, read by its receiver)?

use std::fmt;
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use fabric_core::model::Family;

use super::pod::Pod;
use super::stream::udp_socket;

/// Pings for each pair.
const PINGS: u32 = 3;

/// How many pairs are tried at the same time.
const AT_ONCE: usize = 16;

/// The answers for all pairs of pods, in one or both families.
#[derive(Clone, Debug)]
pub struct Matrix {
    names: Vec<String>,
    cells: Vec<Cell>,
}

/// The answers for one pair in one family.
#[derive(Clone, Debug)]
pub struct Cell {
    /// `node-1/a`
    pub from: String,
    /// `node-2/b`
    pub to: String,
    /// IPv4 or IPv6.
    pub family: Family,
    /// Pings sent.
    pub sent: u32,
    /// Pings that came back.
    pub received: u32,
    /// The address that the sender has.
    pub source: IpAddr,
    /// The address that the target saw; none if nothing arrived.
    pub seen: Option<IpAddr>,
}

impl Matrix {
    /// Tries all pairs of these pods, in every family that both have.
    ///
    /// # Errors
    /// A pod is gone, or `ping` can't be run. Lost packets aren't errors, they are answers.
    pub fn of(pods: &[Pod]) -> Result<Self> {
        let pairs = |family| pods.iter().flat_map(move |from| pods.iter().map(move |to| (from, to, family)));
        let wanted: Vec<(&Pod, &Pod, Family)> = Family::ALL
            .into_iter()
            .flat_map(pairs)
            .filter(|(from, to, family)| {
                from.full_name() != to.full_name() && from.ip(*family).is_ok() && to.ip(*family).is_ok()
            })
            .collect();
        let mut cells = vec![];
        for some in wanted.chunks(AT_ONCE) {
            thread::scope(|scope| {
                let tries: Vec<_> =
                    some.iter().map(|&(from, to, family)| scope.spawn(move || Cell::of(from, to, family))).collect();
                tries.into_iter().try_for_each(|cell| {
                    cells.push(cell.join().map_err(|_| anyhow!("a ping panicked"))??);
                    anyhow::Ok(())
                })
            })?;
        }
        Ok(Self { names: pods.iter().map(Pod::full_name).collect(), cells })
    }

    /// The answers, pair by pair.
    #[must_use]
    pub fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// How many pings didn't come back.
    #[must_use]
    pub fn lost(&self) -> u32 {
        self.cells.iter().map(|cell| cell.sent - cell.received).sum()
    }

    /// The pairs whose target didn't see the source's own address.
    pub fn translated(&self) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(|cell| cell.seen != Some(cell.source))
    }

    /// True if nothing was lost and every source address arrived unchanged.
    #[must_use]
    pub fn is_perfect(&self) -> bool {
        self.lost() == 0 && self.translated().next().is_none()
    }
}

impl Cell {
    fn of(from: &Pod, to: &Pod, family: Family) -> Result<Self> {
        let (source, target) = (from.ip(family)?, to.ip(family)?);
        let count = PINGS.to_string();
        let output = from.exec(&["ping", "-n", "-c", &count, "-i", "0.1", "-W", "2", &target.to_string()])?;
        let received = output.stdout.lines().find_map(|line| line.split_once(" received")).and_then(|(line, _)| {
            let number = line.rsplit(' ').next()?;
            number.parse().ok()
        });
        let received = received.with_context(|| format!("ping says: {}{}", output.stdout, output.stderr))?;
        let seen = who_sent(from, to, family)?;
        Ok(Self { from: from.full_name(), to: to.full_name(), family, sent: PINGS, received, source, seen })
    }
}

/// Sends a UDP packet and returns its source address as the target sees it.
fn who_sent(from: &Pod, to: &Pod, family: Family) -> Result<Option<IpAddr>> {
    let sink = udp_socket(to, family)?;
    sink.set_read_timeout(Some(Duration::from_secs(1)))?;
    let sent = udp_socket(from, family)?.send_to(b"who am I?", sink.local_addr()?);
    Ok(sent.and_then(|_| sink.recv_from(&mut [0; 16])).ok().map(|(_, source)| source.ip()))
}

impl fmt::Display for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.names.iter().map(String::len).max().unwrap_or(0).max(8);
        for family in Family::ALL {
            let cells: Vec<&Cell> = self.cells.iter().filter(|cell| cell.family == family).collect();
            if cells.is_empty() {
                continue;
            }
            writeln!(f, "{family}, lost/sent, from the left to the top")?;
            write!(f, "{:width$}", "")?;
            self.names.iter().try_for_each(|to| write!(f, "  {to:>width$}"))?;
            writeln!(f)?;
            for from in &self.names {
                write!(f, "{from:<width$}")?;
                for to in &self.names {
                    let cell = cells.iter().find(|cell| cell.from == *from && cell.to == *to);
                    let shown =
                        cell.map_or("·".to_owned(), |cell| format!("{}/{}", cell.sent - cell.received, cell.sent));
                    write!(f, "  {shown:>width$}")?;
                }
                writeln!(f)?;
            }
            writeln!(f)?;
        }
        let sent: u32 = self.cells.iter().map(|cell| cell.sent).sum();
        writeln!(f, "{} pairs, {sent} pings, {} lost", self.cells.len(), self.lost())?;
        for cell in self.translated() {
            match cell.seen {
                Some(seen) => writeln!(f, "{} sees {} as {seen}, not as {}", cell.to, cell.from, cell.source)?,
                None => writeln!(f, "{} gets no UDP packet of {} ({})", cell.to, cell.from, cell.family)?,
            }
        }
        if self.translated().next().is_none() {
            writeln!(f, "every pod sees every other by its own address: no NAT")?;
        }
        Ok(())
    }
}
