//! [`Netlink`]: the kernel of this network namespace.
//!
//! Reading and writing block (on the kernel's own lock above all), so they run on tokio's blocking threads, one at a
//! time, each call bounded. What was read is kept by the [`Mirror`].

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fabric_core::derived::Dirty;
use fabric_core::diff::nft::Transaction;
use fabric_core::diff::routing::Op as RoutingOp;
use fabric_core::diff::{Change, Key, Op, fast_path as fast, nft as filter};
use fabric_core::model::IfName;
use fabric_core::state::{Sysctl, Via};
use fabric_netlink::{Refusal, RequestSocket};
use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::task::JoinHandle;

use super::audit::Turns;
use super::fast_path::{self, Bpf};
use super::mirror::Mirror;
use super::monitor::{Monitor, Table};
use super::nft::{self, Filter};
use super::routing::encode::{Device, Unsendable, encode};
use super::routing::tables;
use super::{Kernel, KernelError, Observed, Options, Touched, refusal, sysctl};

/// A call that takes longer has a kernel that hangs: the largest plans take a second.
const LIMIT: Duration = Duration::from_secs(30);

/// The kernel, over netlink.
pub struct Netlink {
    worker: Arc<Mutex<Worker>>,
    monitor: Arc<Monitor>,
    touched: Dirty<Key>,
    listeners: Vec<JoinHandle<()>>,
    turns: Turns,
}

impl Netlink {
    /// Opens the kernel of this thread's network namespace. Must be called within a tokio runtime whose threads are in
    /// the same namespace, since settings are files that show the reader's own.
    ///
    /// # Errors
    /// When a netlink socket can't be opened.
    pub fn new(options: Options) -> Result<Self, KernelError> {
        let gone = |error: io::Error| KernelError::Disconnected(error.to_string());
        // The monitor first, so that nothing happens between a look and listening.
        let (monitor, listener) = Monitor::start().map_err(gone)?;
        let filter = Filter::open().map_err(gone)?;
        let mut listeners = vec![listener];
        if let Some(port) = filter.port() {
            let listener = nft::watch::start(Arc::clone(&monitor), port, options.services_apart);
            listeners.push(listener.map_err(gone)?);
        }
        if options.fast_path {
            listeners.extend(fast_path::shaping::watch_policies(Arc::clone(&monitor)).map_err(gone)?);
        }
        let worker = Worker {
            socket: RequestSocket::open(NETLINK_ROUTE).map_err(gone)?,
            filter,
            bpf: Bpf::new(&options.bpffs, options.fast_path),
            monitor: Arc::clone(&monitor),
            options,
            mirror: Mirror::default(),
        };
        let (touched, turns) = (Dirty::Everything, Turns::default());
        Ok(Self { worker: Arc::new(Mutex::new(worker)), monitor, touched, listeners, turns })
    }

    /// Runs `job` on a blocking thread. When it is cancelled or takes too long, the job is still finished, and the next
    /// one waits for it.
    async fn work<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Result<T, KernelError> {
        let worker = Arc::clone(&self.worker);
        let job = tokio::task::spawn_blocking(move || job(&mut worker.lock().unwrap_or_else(PoisonError::into_inner)));
        match tokio::time::timeout(LIMIT, job).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(error)) => Err(KernelError::Disconnected(error.to_string())),
            Err(_) => Err(KernelError::Busy(LIMIT.as_secs())),
        }
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.listeners.iter().for_each(JoinHandle::abort);
    }
}

impl Kernel for Netlink {
    async fn observe(&mut self) -> Result<Arc<Observed>, KernelError> {
        // Of an answer that never comes it is not known what it would have told.
        let known = std::mem::replace(&mut self.touched, Dirty::Everything);
        let (observed, touched) = self.work(Worker::observe).await??;
        self.touched = known;
        self.touched.extend(touched);
        Ok(observed)
    }

    fn touched(&mut self) -> Dirty<Key> {
        std::mem::take(&mut self.touched)
    }

    async fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        let steps = ops.to_vec();
        match self.work(move |worker| worker.apply(&steps)).await {
            Ok(results) => results,
            Err(KernelError::Busy(seconds)) => ops.iter().map(|_| Err(KernelError::Busy(seconds))).collect(),
            Err(error) => ops.iter().map(|_| Err(KernelError::Disconnected(error.to_string()))).collect(),
        }
    }

    async fn changed(&mut self) -> Touched {
        self.monitor.changed().await
    }

    fn audit(&mut self) {
        self.monitor.distrust(self.turns.next());
    }
}

/// The blocking half.
struct Worker {
    socket: RequestSocket,
    filter: Filter,
    bpf: Bpf,
    monitor: Arc<Monitor>,
    options: Options,
    mirror: Mirror,
}

impl Worker {
    fn observe(&mut self) -> Result<(Arc<Observed>, Dirty<Key>), KernelError> {
        let heard = self.monitor.take();
        let observed = self.mirror.look(heard, &mut self.socket, &mut self.filter, &mut self.bpf, &self.options)?;
        self.monitor.set_interest(self.mirror.interest(&self.options));
        self.monitor.pace_firewalls(self.mirror.firewalls_took());
        Ok((observed, self.mirror.touched()))
    }

    /// Each section has a writer of its own.
    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        let (mut routing, mut filter, mut fast) = (vec![], vec![], vec![]);
        for op in ops {
            match op {
                Op::Routing(op) => routing.push(op),
                Op::Filter(op) => filter.push(op),
                Op::FastPath(op) => fast.push(op),
            }
        }
        let (mut routing, mut filter) =
            (self.write_routing(&routing).into_iter(), self.write_filter(&filter).into_iter());
        let mut fast = self.write_fast_path(&fast).into_iter();
        let result = |op: &Op| match op {
            Op::Routing(_) => routing.next(),
            Op::Filter(_) => filter.next(),
            Op::FastPath(_) => fast.next(),
        };
        ops.iter().map(result).map(|result| result.expect("a writer answers every step")).collect()
    }

    fn write_routing(&mut self, ops: &[&RoutingOp]) -> Vec<Result<(), KernelError>> {
        let mut devices = BTreeMap::new();
        let mut results = Vec::with_capacity(ops.len());
        let mut requests = vec![];
        // Which op each request belongs to: an op may take none or several.
        let mut owners = vec![];
        for (position, op) in ops.iter().enumerate() {
            let refusal = match op {
                RoutingOp::Sysctl(setting, value) => self.set(setting, *value).err(),
                _ => match self.look_up(op, &mut devices) {
                    Err(error) => Some(error.into()),
                    Ok(()) => match encode(op, |name| devices.get(name).copied().flatten()) {
                        Ok(messages) => {
                            owners.extend(messages.iter().map(|_| position));
                            requests.extend(messages);
                            None
                        }
                        Err(why) => Some(unsendable(&why)),
                    },
                },
            };
            results.push(refusal.map_or(Ok(()), |refusal| Err(self.refused(op, refusal))));
        }
        let answers = self.socket.write(&requests);
        for (answer, position) in answers.into_iter().zip(owners) {
            // Of several refusals the first tells why.
            if let (Err(refusal), true) = (answer, results[position].is_ok())
                && !is_as_wanted(ops[position], &refusal)
            {
                results[position] = Err(self.refused(ops[position], refusal));
            }
        }
        for (op, result) in ops.iter().zip(&results) {
            if let (RoutingOp::Fdb(dev, mac, Change::Delete(_)), Ok(())) = (op, result) {
                self.mirror.deleted(*dev, *mac);
            }
        }
        // What is known may be why: the next look, which is that before the next try, reads it anew.
        for (op, _) in ops.iter().zip(&results).filter(|(_, result)| result.is_err()) {
            self.mirror.distrust(met_by(op));
        }
        results
    }

    /// A transaction is taken or refused as a whole. What was written is known without reading it again.
    fn write_filter(&mut self, ops: &[&filter::Op]) -> Vec<Result<(), KernelError>> {
        let mut transactions: BTreeMap<Transaction, Vec<usize>> = BTreeMap::new();
        for (position, op) in ops.iter().enumerate() {
            transactions.entry(op.transaction()).or_default().push(position);
        }
        let mut results: Vec<_> = ops.iter().map(|_| Ok(())).collect();
        for (transaction, positions) in transactions {
            let steps: Vec<&filter::Op> = positions.iter().map(|position| ops[*position]).collect();
            match self.filter.write(&steps) {
                // The handles of rules are the kernel's to give.
                Ok(()) if matches!(transaction, Transaction::DockerUser(_)) => {
                    self.monitor.distrust([Table::Firewalls]);
                }
                Ok(()) => self.mirror.wrote(steps.into_iter().cloned()),
                Err(Refusal { error, words }) => {
                    let of = steps.iter().filter_map(|op| op.table()).map(Table::Rules);
                    self.mirror.distrust(&of.collect::<Vec<_>>());
                    let owner = if error.raw_os_error() == Some(libc::EPERM) { self.filter.owner() } else { None };
                    for position in positions {
                        let same = copy_of(&error);
                        results[position] =
                            Err(KernelError::of_filter(ops[position], &steps, same, words.clone(), owner.clone()));
                    }
                }
            }
        }
        results
    }

    /// Our own writes are announced to nobody: the loop looks again, as what is gone may make room for more.
    fn write_fast_path(&mut self, ops: &[&fast::Op]) -> Vec<Result<(), KernelError>> {
        let mut results = vec![];
        for op in ops {
            let result = self.bpf.write(op);
            results.push(
                result.map_err(|fast_path::Refused { error, words }| KernelError::of_fast_path(op, error, words)),
            );
        }
        if results.iter().any(Result::is_ok) {
            self.monitor.wake();
        }
        results
    }

    /// The error of an op: what was done, what the kernel said, and the way out.
    fn refused(&self, op: &RoutingOp, refusal: Refusal) -> KernelError {
        let Refusal { error, mut words } = refusal;
        if let (Some(libc::EADDRINUSE), RoutingOp::Link(_, Change::Create(link) | Change::Replace { now: link, .. })) =
            (error.raw_os_error(), op)
        {
            words = Some(refusal::port_holder(link.port, &self.mirror.on_port(link.port)));
        }
        KernelError::of_routing(op, error, words)
    }

    fn set(&mut self, setting: &Sysctl, value: u32) -> Result<(), Refusal> {
        sysctl::write(&self.options.sysctl_root, setting, value)
            .map_err(|(error, words)| Refusal { error, words: Some(words) })?;
        // The kernel announces few of them.
        self.monitor.distrust([Table::Sysctls]);
        Ok(())
    }

    /// Asks for the device that `op` names: anew in each batch, since the one before may have made it.
    fn look_up(&mut self, op: &RoutingOp, devices: &mut BTreeMap<IfName, Option<Device>>) -> io::Result<()> {
        if let Some(name) = device_of(op)
            && !devices.contains_key(name)
        {
            let link = tables::link_named(&mut self.socket, name)?;
            let device = link.map(|link| Device { index: link.index, ours: link.ours.is_some() });
            devices.insert(*name, device);
        }
        Ok(())
    }
}

/// The device whose index an op's message needs.
fn device_of(op: &RoutingOp) -> Option<&IfName> {
    match op {
        RoutingOp::Sysctl(..) | RoutingOp::Link(_, Change::Create(_)) => None,
        RoutingOp::Link(dev, _)
        | RoutingOp::Outgrown(dev, _)
        | RoutingOp::Address(dev, _)
        | RoutingOp::Fdb(dev, _, _)
        | RoutingOp::Neighbour(dev, _, _) => Some(dev),
        RoutingOp::Nexthop(_, Change::Create(to) | Change::Replace { now: to, .. }) => Some(&to.dev),
        RoutingOp::Nexthop(_, Change::Delete(_)) => None,
        RoutingOp::Route(_, Change::Create(via) | Change::Replace { now: via, .. } | Change::Delete(via)) => {
            match via {
                Via::Gateway(to) | Via::Direct(to) => Some(&to.dev),
                Via::Nexthop(_) | Via::Other(_) => None,
            }
        }
    }
}

/// The tables that decide whether the kernel takes an op.
fn met_by(op: &RoutingOp) -> &'static [Table] {
    match op {
        RoutingOp::Sysctl(..) => &[Table::Sysctls],
        RoutingOp::Link(..) | RoutingOp::Outgrown(..) => &[Table::Links],
        RoutingOp::Address(..) => &[Table::Links, Table::Addresses],
        RoutingOp::Fdb(..) => &[Table::Links, Table::Fdb],
        RoutingOp::Neighbour(..) => &[Table::Links, Table::Neighbours],
        RoutingOp::Nexthop(..) => &[Table::Links, Table::Nexthops],
        RoutingOp::Route(..) => &[Table::Links, Table::Nexthops, Table::Routes, Table::HostRoutes],
    }
}

/// True when the kernel refuses because there is nothing left to do.
fn is_as_wanted(op: &RoutingOp, refusal: &Refusal) -> bool {
    match refusal.error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL) => op.is_delete(),
        Some(libc::EEXIST) => matches!(op, RoutingOp::Address(..)),
        // The nexthop object of the route is gone, and took the route along.
        Some(libc::EINVAL) => matches!(op, RoutingOp::Route(_, Change::Delete(Via::Nexthop(_)))),
        _ => false,
    }
}

/// The same error for each step of a transaction.
pub(super) fn copy_of(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| io::Error::new(error.kind(), error.to_string()), io::Error::from_raw_os_error)
}

fn unsendable(why: &Unsendable) -> Refusal {
    match why {
        Unsendable::NoDevice => Refusal {
            error: io::Error::from_raw_os_error(libc::ENODEV),
            words: Some("it is gone, or another device has its name".into()),
        },
        Unsendable::Senseless(words) => {
            Refusal { error: io::Error::from_raw_os_error(libc::EINVAL), words: Some((*words).to_owned()) }
        }
    }
}
