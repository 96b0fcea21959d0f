//! NetworkPolicy and ClusterNetworkPolicy: what Kubernetes promises, row by row, and what the packet filter makes of it.

mod interpreter;
mod objects;
mod planned;
mod reasons;
mod semantics;
mod tiers;
mod unreadable;
mod unreadable_cluster;
mod world;
