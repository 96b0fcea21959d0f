//! [`Pods`]: all pods of a cluster, by name and by address, in little memory: there may be 150,000, of which this node has
//! some dozens.
//!
//! A pod is kept once; each order is a set of references to it. A copy shares all that it has in common, so an earlier one
//! costs nothing, and what differs between two is found without a look at the rest.

use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::Arc;

use super::model::{ObjectName, Pod};
use crate::cow_map::CowSet;
use crate::services::sets::lacks_most_of;

/// All pods. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Pods {
    by_name: CowSet<ByName>,
    /// Those that may have an address of their own.
    by_v4: CowSet<ByV4>,
    by_v6: CowSet<ByV6>,
    /// Those that are to go.
    by_end: CowSet<ByEnd>,
}

/// References to pods in the order of something; a pod is found once for each name.
macro_rules! order {
    ($name:ident, $pod:ident => $key:expr) => {
        #[derive(Clone, Debug)]
        struct $name(Arc<Pod>);

        impl Ord for $name {
            fn cmp(&self, other: &Self) -> Ordering {
                let key = |$pod: &Pod| $key;
                key(&self.0).cmp(&key(&other.0)).then_with(|| self.0.name.cmp(&other.0.name))
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                self.cmp(other).is_eq()
            }
        }

        impl Eq for $name {}
    };
}

order!(ByName, _pod => ());
order!(ByV4, pod => pod.v4);
order!(ByV6, pod => pod.v6);
order!(ByEnd, pod => pod.ends);

/// A pod as it was, as it is, or both.
pub type Change<'a> = (Option<&'a Pod>, Option<&'a Pod>);

impl Pods {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// True when there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// All of them, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.by_name.keys().map(|ByName(pod)| pod)
    }

    /// The one of this name.
    #[must_use]
    pub fn get(&self, name: &ObjectName) -> Option<&Arc<Pod>> {
        let (ByName(pod), ()) = self.by_name.find(|ByName(pod)| pod.name.cmp(name))?;
        Some(pod)
    }

    /// Those of a namespace.
    pub fn of_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Arc<Pod>> {
        let first = ObjectName::new(namespace, "");
        let from_there = self.by_name.starting_where(move |ByName(pod)| pod.name.cmp(&first));
        from_there.map(|(ByName(pod), ())| pod).take_while(move |pod| pod.name.namespace() == namespace)
    }

    /// Those that say an address is theirs.
    pub fn with_address(&self, ip: IpAddr) -> impl Iterator<Item = &Arc<Pod>> {
        // Less than all with it: its first is where one would be put in.
        let before = |order: Ordering| order.then(Ordering::Greater);
        let (v4, v6) = match ip {
            IpAddr::V4(ip) => (Some(self.by_v4.starting_where(move |ByV4(pod)| before(pod.v4.cmp(&Some(ip))))), None),
            IpAddr::V6(ip) => (None, Some(self.by_v6.starting_where(move |ByV6(pod)| before(pod.v6.cmp(&Some(ip)))))),
        };
        let v4 = v4.into_iter().flatten().map(|(ByV4(pod), ())| pod);
        let all = v4.chain(v6.into_iter().flatten().map(|(ByV6(pod), ())| pod));
        all.take_while(move |pod| pod.ips().any(|own| own == ip))
    }

    /// Those whose grace period ends after one second and not after another.
    pub fn ending(&self, after: i64, until: i64) -> impl Iterator<Item = &Arc<Pod>> {
        let ends = |pod: &Pod| pod.ends.map_or(i64::MIN, i64::from);
        let before = move |ByEnd(pod): &ByEnd| if ends(pod) > after { Ordering::Greater } else { Ordering::Less };
        let later = self.by_end.starting_where(before).map(|(ByEnd(pod), ())| pod);
        later.take_while(move |pod| ends(pod) <= until)
    }

    /// Puts one in; gives the one of its name that was there.
    pub fn insert(&mut self, pod: impl Into<Arc<Pod>>) -> Option<Arc<Pod>> {
        let pod = pod.into();
        let before = self.remove(&pod.name);
        if pod.has_own_network() && pod.v4.is_some() {
            self.by_v4.insert(ByV4(Arc::clone(&pod)), ());
        }
        if pod.has_own_network() && pod.v6.is_some() {
            self.by_v6.insert(ByV6(Arc::clone(&pod)), ());
        }
        if pod.ends.is_some() {
            self.by_end.insert(ByEnd(Arc::clone(&pod)), ());
        }
        self.by_name.insert(ByName(pod), ());
        before
    }

    /// Takes one out; gives it.
    pub fn remove(&mut self, name: &ObjectName) -> Option<Arc<Pod>> {
        let pod = Arc::clone(self.get(name)?);
        self.by_v4.remove(&ByV4(Arc::clone(&pod)));
        self.by_v6.remove(&ByV6(Arc::clone(&pod)));
        self.by_end.remove(&ByEnd(Arc::clone(&pod)));
        self.by_name.remove(&ByName(Arc::clone(&pod)));
        Some(pod)
    }

    /// In as little memory as it takes, after many were put in.
    pub fn compact(&mut self) {
        self.by_name.compact();
        self.by_v4.compact();
        self.by_v6.compact();
        self.by_end.compact();
    }

    /// True when more than half of what was known is gone; of a few, any number may go.
    #[must_use]
    pub fn lacks_most_of(&self, before: &Self) -> bool {
        lacks_most_of(&self.by_name, &before.by_name)
    }

    /// Those that differ from `before`, in the order of their names. What both share is not looked into.
    pub fn changes<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = Change<'a>> {
        let same =
            |(ByName(was), ()): (&ByName, &()), (ByName(is), ()): (&ByName, &())| Arc::ptr_eq(was, is) || was == is;
        let pod = |(ByName(pod), ()): (&'a ByName, &'a ())| &**pod;
        self.by_name.changes_where(&before.by_name, same).map(move |(was, is)| (was.map(pod), is.map(pod)))
    }
}

impl<P: Into<Arc<Pod>>> FromIterator<P> for Pods {
    /// In as little memory as it takes.
    fn from_iter<I: IntoIterator<Item = P>>(pods: I) -> Self {
        let mut all = Self::default();
        pods.into_iter().for_each(|pod| drop(all.insert(pod)));
        all.compact();
        all
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn pod(name: &str, v4: Option<u8>, ends: Option<u32>) -> Pod {
        let (namespace, name) = name.split_once('/').expect("namespace/name");
        let v4 = v4.map(|host| [192, 0, 2, host].into());
        let v6 = v4.map(|ip: std::net::Ipv4Addr| ip.to_ipv6_mapped());
        Pod { v4, v6, ends, ..Pod::named(ObjectName::new(namespace, name)) }
    }

    fn names<'a>(pods: impl Iterator<Item = &'a Arc<Pod>>) -> Vec<String> {
        pods.map(|pod| pod.name.to_string()).collect()
    }

    proptest! {
        #[test]
        fn pods_are_found_by_name_namespace_address_and_end(
            steps in prop::collection::vec(
                (prop::sample::select(vec!["a", "a-b", "a.b", "b"]), 0..40_u8, prop::option::of((0..9_u8, prop::option::of(0..9_u32)))),
                0..300,
            ),
        ) {
            let (mut pods, mut model, mut before) = (Pods::default(), BTreeMap::new(), Pods::default());
            for (at, (namespace, number, what)) in steps.iter().enumerate() {
                let name = format!("{namespace}/pod-{number}");
                let key = ObjectName::new(namespace, &format!("pod-{number}"));
                match what {
                    Some((host, ends)) => {
                        let new = pod(&name, (*host > 0).then_some(*host), *ends);
                        let (before, wanted) = (pods.insert(new.clone()), model.insert(key, new));
                        prop_assert_eq!(before.as_deref(), wanted.as_ref());
                    }
                    None => {
                        let (before, wanted) = (pods.remove(&key), model.remove(&key));
                        prop_assert_eq!(before.as_deref(), wanted.as_ref());
                    }
                }
                if at == steps.len() / 2 {
                    before = pods.clone();
                }
            }
            let wanted = |test: &dyn Fn(&Pod) -> bool| -> Vec<String> {
                model.values().filter(|pod| test(pod)).map(|pod| pod.name.to_string()).collect()
            };
            prop_assert_eq!(names(pods.iter()), wanted(&|_| true));
            prop_assert!(model.iter().all(|(name, pod)| pods.get(name).map(|it| &**it) == Some(pod)));
            for namespace in ["a", "a-b", "a.b", "b", "c"] {
                prop_assert_eq!(names(pods.of_namespace(namespace)), wanted(&|pod| pod.name.namespace() == namespace));
            }
            for host in 0..10 {
                let ip = std::net::Ipv4Addr::from([192, 0, 2, host]);
                for ip in [IpAddr::from(ip), ip.to_ipv6_mapped().into()] {
                    prop_assert_eq!(names(pods.with_address(ip)), wanted(&|pod| pod.ips().any(|own| own == ip)));
                }
            }
            let mut ending = names(pods.ending(2, 5));
            ending.sort();
            prop_assert_eq!(ending, wanted(&|pod| pod.ends.is_some_and(|ends| (3..=5).contains(&ends))));
            let mut replayed = before.clone();
            for (was, is) in pods.changes(&before) {
                prop_assert!(was != is);
                match (was, is) {
                    (_, Some(is)) => drop(replayed.insert(is.clone())),
                    (Some(was), None) => drop(replayed.remove(&was.name)),
                    (None, None) => {}
                }
            }
            prop_assert!(replayed.iter().eq(pods.iter()));
        }
    }
}
