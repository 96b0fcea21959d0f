//! Maps, programs, links and pins in the real kernel, each test in namespaces of its own. Needs root, and Linux 6.6.

use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use fabric_ebpf::{Code, Hook, Kind, Link, LoadError, Map, MapUse, Object, Program, Shape, attached};
use nix::mount::{MsFlags, mount};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};

/// A bpffs and a network of this thread's own; both go with it.
fn in_namespaces(test: impl FnOnce(PathBuf) + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("needs root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
        let folder = tempfile::tempdir().expect("a folder");
        mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), none).expect("a bpffs");
        test(folder.path().to_owned());
        nix::mount::umount(folder.path()).expect("unmounted");
    };
    std::thread::spawn(run).join().expect("no panic");
}

fn shape(kind: Kind, value_size: u32) -> Shape {
    Shape { kind, key_size: 4, value_size, max_entries: 8, flags: 0 }
}

fn load(code: &Code, maps: &[(&str, &Map)]) -> Result<Program, LoadError> {
    Program::load(code, c"Apache-2.0", maps)
}

/// `r0 = <verdict>; exit`
fn returning(name: &str, verdict: i32) -> Code {
    let mut instructions = vec![0xb7, 0, 0, 0];
    instructions.extend(verdict.to_le_bytes());
    instructions.extend([0x95, 0, 0, 0, 0, 0, 0, 0]);
    Code { name: name.to_owned(), instructions, maps: vec![] }
}

/// `r1 = <map>; r0 = -1; exit`
fn with_map(map: &str) -> Code {
    let mut code = returning("fabric_map", -1);
    code.instructions.splice(0..0, [0x18, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    code.maps.push(MapUse { at: 0, map: map.to_owned() });
    code
}

#[test]
fn maps_keep_what_is_set_and_arrays_are_read_at_once() {
    in_namespaces(|_| {
        let array = Map::create("fabric_array", shape(Kind::Array, 8)).expect("made");
        array.set(&3_u32.to_ne_bytes(), &[7; 8]).expect("set");
        assert_eq!(array.get(&3_u32.to_ne_bytes()).expect("read"), Some(vec![7; 8]));
        let mut found = vec![];
        array.each_value(|index, value| found.push((index, value[0]))).expect("read");
        assert_eq!(found, [(0, 0), (1, 0), (2, 0), (3, 7), (4, 0), (5, 0), (6, 0), (7, 0)]);
        let error = array.set(&8_u32.to_ne_bytes(), &[7; 8]).expect_err("eight entries");
        assert_eq!(error.raw_os_error(), Some(libc::E2BIG));

        let large = Map::create("fabric_large", Shape { max_entries: 1_300, ..shape(Kind::Array, 4) }).expect("made");
        (0..1_300_u32).for_each(|n| large.set(&n.to_ne_bytes(), &n.to_ne_bytes()).expect("set"));
        let mut found = vec![];
        large.each_value(|index, value| found.push((index, value.to_vec()))).expect("read");
        assert!(found.into_iter().eq((0..1_300_u32).map(|n| (n, n.to_ne_bytes().to_vec()))), "by several calls");

        for kind in [Kind::Hash, Kind::LruHash] {
            let map = Map::create("fabric_hash", shape(kind, 2)).expect("made");
            assert_eq!(map.get(&[1, 2, 3, 4]).expect("read"), None);
            map.set(&[1, 2, 3, 4], &[5, 6]).expect("set");
            assert_eq!(map.get(&[1, 2, 3, 4]).expect("read"), Some(vec![5, 6]));
            assert_eq!(map.keys().expect("read"), [[1, 2, 3, 4]]);
            assert!(map.remove(&[1, 2, 3, 4]).expect("removed"));
            assert!(!map.remove(&[1, 2, 3, 4]).expect("nothing there"));
        }
        array.zero(&3_u32.to_ne_bytes()).expect("zeroed");
        assert_eq!(array.get(&3_u32.to_ne_bytes()).expect("read"), Some(vec![0; 8]));
        let counters = Map::create("fabric_counts", shape(Kind::PerCpuArray, 8)).expect("made");
        counters.zero(&0_u32.to_ne_bytes()).expect("zeroed on each processor");
        let value = counters.get(&0_u32.to_ne_bytes()).expect("read").expect("there");
        assert!(value.len() >= 8 && value.len().is_multiple_of(8) && value.iter().all(|byte| *byte == 0), "{value:?}");
    });
}

#[test]
fn pins_outlive_descriptors_and_what_is_something_else_is_refused() {
    in_namespaces(|bpffs| {
        let (map, program) = (bpffs.join("map"), bpffs.join("program"));
        let wanted = shape(Kind::Array, 8);
        let made = Map::create("fabric_array", wanted).expect("made");
        made.set(&1_u32.to_ne_bytes(), &[9; 8]).expect("set");
        made.pin(&map).expect("pinned");
        assert_eq!(made.pin(&map).expect_err("taken").kind(), ErrorKind::AlreadyExists);
        drop(made);
        let again = Map::open(&map).expect("there");
        assert_eq!(again.shape(), wanted);
        assert_eq!(again.get(&1_u32.to_ne_bytes()).expect("read"), Some(vec![9; 8]));

        load(&returning("fabric_next", -1), &[]).expect("loaded").pin(&program).expect("pinned");
        let other = Map::open(&program).expect_err("a program");
        assert_eq!(
            (other.kind(), other.to_string().as_str()),
            (ErrorKind::InvalidData, "it is not a map, but a bpf-prog")
        );
        let other = Program::open(&map).expect_err("a map");
        assert_eq!(
            (other.kind(), other.to_string().as_str()),
            (ErrorKind::InvalidData, "it is not a program, but a bpf-map")
        );
        assert_eq!(Link::open(&map).expect_err("a map").kind(), ErrorKind::InvalidData);
        assert_eq!(Link::open(&bpffs.join("none")).expect_err("nothing").kind(), ErrorKind::NotFound);
        let plain = tempfile::tempdir().expect("a folder");
        assert!(again.pin(&plain.path().join("map")).is_err(), "not a bpffs");
    });
}

#[test]
fn link_stands_behind_others_is_replaced_in_place_and_goes_with_its_pin() {
    in_namespaces(|bpffs| {
        let lo = if_nametoindex(CString::new("lo").expect("a name").as_c_str()).expect("there");
        let others = load(&returning("others", -1), &[]).expect("loaded");
        let foreign = Link::attach(&others, lo, Hook::Ingress).expect("attached");
        let (first, second) = (
            load(&returning("fabric_first", -1), &[]).expect("loaded"),
            load(&returning("fabric_second", -1), &[]).expect("loaded"),
        );
        let names =
            || attached(lo, Hook::Ingress).expect("asked").into_iter().map(|info| info.name).collect::<Vec<_>>();
        let path = bpffs.join("link");
        Link::attach(&first, lo, Hook::Ingress).expect("attached").pin(&path).expect("pinned");
        assert_eq!(names(), ["others", "fabric_first"]);
        let link = Link::open(&path).expect("there");
        assert_eq!(link.program_and_interface().expect("told"), (first.info().expect("told").id, lo));
        link.replace(&second).expect("replaced");
        assert_eq!(names(), ["others", "fabric_second"]);
        assert_eq!(attached(lo, Hook::Egress).expect("asked"), []);
        assert!(Link::are_known(&first).expect("asked"));
        link.detach().expect("detached");
        assert_eq!(names(), ["others"]);
        assert_eq!(link.program_and_interface().expect("told").1, 0, "it is nowhere");
        fs::remove_file(&path).expect("removed");
        drop(foreign);
        assert_eq!(names(), Vec::<String>::new());
        assert_eq!(attached(4_000_000, Hook::Ingress).expect_err("no interface").raw_os_error(), Some(libc::ENODEV));
    });
}

#[test]
fn programs_have_their_maps_and_refused_ones_the_verifiers_words() {
    in_namespaces(|_| {
        let map = Map::create("fabric_array", shape(Kind::Array, 8)).expect("made");
        let program = load(&with_map("peers"), &[("peers", &map)]).expect("loaded");
        assert_eq!(program.info().expect("told").name, "fabric_map");
        let ran = program.test_run(&[0; 64], &[], 1).expect("run");
        assert_eq!((ran.returned.cast_signed(), ran.packet), (-1, vec![0; 64]));
        let missing = load(&with_map("peers"), &[]).expect_err("no map").to_string();
        assert_eq!(missing, "fabric_map uses a map peers, which isn't there");

        // `exit` alone: r0 was never written.
        let code = Code { name: "fabric_bad".into(), instructions: vec![0x95, 0, 0, 0, 0, 0, 0, 0], maps: vec![] };
        let refused = load(&code, &[]).expect_err("refused");
        assert_eq!(refused.error.raw_os_error(), Some(libc::EACCES));
        assert!(refused.to_string().contains("R0 !read_ok"), "{refused}");
    });
}

#[test]
fn what_clang_makes_is_read_and_runs() {
    in_namespaces(|bpffs| {
        let folder = tempfile::tempdir().expect("a folder");
        let compile = |source: &str| {
            let (c, o) = (folder.path().join("test.c"), folder.path().join("test.o"));
            fs::write(&c, source).expect("written");
            let done = std::process::Command::new("clang")
                .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-c"])
                .args([&c, std::path::Path::new("-o"), &o])
                .output()
                .expect("clang");
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            Object::parse(&fs::read(o).expect("made"))
        };
        let object = compile(
            r#"
            struct { int (*type)[2]; unsigned *key; unsigned long *value; int (*max_entries)[8]; } counts
                __attribute__((section(".maps"), used));
            static void *(*lookup)(void *map, const void *key) = (void *)1;
            __attribute__((section("tc/count"), used)) int fabric_count(void *skb) {
                unsigned key = 5;
                unsigned long *value = lookup(&counts, &key);
                if (value) *value += 1;
                return -1;
            }
            __attribute__((section("tc/next"), used)) int fabric_next(void *skb) { return -1; }"#,
        )
        .expect("read");
        let names: Vec<&str> = object.programs.iter().map(|code| code.name.as_str()).collect();
        assert_eq!(names, ["fabric_count", "fabric_next"]);
        assert_ne!(object.programs[0].fingerprint(), object.programs[1].fingerprint());
        let counts = Map::create("counts", shape(Kind::Array, 8)).expect("made");
        let program = load(&object.programs[0], &[("counts", &counts)]).expect("loaded");
        program.test_run(&[0; 64], &[], 3).expect("run");
        assert_eq!(counts.get(&5_u32.to_ne_bytes()).expect("read"), Some(3_u64.to_ne_bytes().to_vec()));
        program.pin(&bpffs.join("count")).expect("pinned");
        let again = Program::open(&bpffs.join("count")).expect("there");
        assert_eq!(again.info().expect("told"), program.info().expect("told"));

        let variable = compile(
            r#"int counter;
               __attribute__((section("tc"), used)) int fabric_count(void *skb) { return counter++; }"#,
        );
        let why = variable.expect_err("a variable").to_string();
        assert!(why.contains("fabric_count refers to") && why.contains("variables be in maps"), "{why}");
    });
}
