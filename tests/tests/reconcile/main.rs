//! The reconcile loop and the lease keeper, on a kernel and a store in memory: whatever fails, they come to what the
//! leases say, and then fall silent.

mod failing_writes;
mod leases;
mod node;
mod obstacles;
mod repairs;
mod restarts;
