//! Each fault once. `make faults SEEDS=20` tries them again and again.

use fabric_tests::faults;

fn holds(number: u8) {
    for fault in faults::all().iter().filter(|fault| fault.number == number) {
        if let Some(error) = fault.try_with(1, 4).broken {
            panic!("{}: {error:?}", fault.what);
        }
    }
}

macro_rules! faults {
    ($($name:ident = $number:literal),* $(,)?) => {
        $(#[test] fn $name() { holds($number) })*

        #[test]
        fn every_fault_has_its_test() {
            let known = [$($number),*];
            assert!(faults::all().iter().all(|fault| known.contains(&fault.number)));
        }
    };
}

faults! {
    killed_while_programming = 1,
    crash_loop = 2,
    store_away = 3,
    history_compacted = 4,
    half_open_connection = 5,
    lease_revoked = 6,
    lease_lost_to_another = 7,
    cut_off_from_the_store = 8,
    stampede = 9,
    duplicates = 10,
    another_store = 11,
    store_in_need = 12,
    clock_jumps = 13,
    underlay_flaps = 14,
    underlay_address_changes = 15,
    underlay_mtu_changes = 16,
    device_deleted = 17,
    entries_altered = 18,
    what_is_foreign = 19,
    peers_re_created = 20,
    churn = 21,
    notifications_lost = 22,
    garbage_in_etcd = 23,
    add_killed = 24,
    requests_repeated = 25,
    many_requests_at_once = 26,
    bad_requests = 27,
    state_spoiled = 28,
    power_cut = 29,
    add_too_early = 30,
    bad_delegates = 31,
    descriptors_and_disk_exhausted = 32,
    subnet_exhausted = 33,
    downgrade = 34,
    attacks = 35,
    rules_spoiled = 36,
}
