//! The settings, as flags, variables and files give them.

use super::*;

fn load(args: &[&str], file: Option<&str>) -> Result<Config, String> {
    let dir = tempfile::tempdir().expect("temporary folder");
    let path = dir.path().join("fabricd.toml");
    let mut all = vec![OsString::from("fabricd")];
    if let Some(text) = file {
        std::fs::write(&path, text).expect("written");
        all.extend(["--config".into(), path.into()]);
    }
    all.extend(args.iter().map(OsString::from));
    Config::load(crate::command_line::command_line(), all).map_err(|e| e.to_string())
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let file =
        "etcd_endpoints = ['http://192.0.2.1:2379', 'http://192.0.2.2:2379']\nlease_ttl = '1h'\niface = 'eth1'\n";
    let config = load(&["--lease-ttl", "30m"], Some(file)).expect("valid");
    assert_eq!(config.etcd.endpoints, ["http://192.0.2.1:2379", "http://192.0.2.2:2379"]);
    assert_eq!(config.lease_ttl, Duration::from_secs(1800));
    assert_eq!(config.iface, ["eth1"]);
    assert_eq!(config.etcd.prefix, "/coreos.com/network");
}

#[test]
fn variables_of_the_service_win_over_its_file() {
    let text = "# a comment\nFABRICD_ETCD_ENDPOINTS=http://192.0.2.1:2379,http://192.0.2.2:2379\n\
                FABRICD_ETCD_PREFIX=\"/other\"\n; another\nFABRICD_CNI_BIN_DIR=/opt/cni/bin\nPATH=/bin\n\
                FABRICD_LEASE_TTL = '1h'\nFABRICD_CLEANUP=true\n";
    let dir = tempfile::tempdir().expect("temporary folder");
    let file = dir.path().join("fabricd.toml");
    std::fs::write(&file, "etcd_endpoints = ['http://192.0.2.9:2379']\niface = 'eth1'\n").expect("written");
    let command = with_variables(with_file(Config::command(), &file).expect("valid"), &variables(text));
    let config = Config::parse_with(command, &["fabricd".into()], &file).expect("valid");
    assert_eq!(config.etcd.endpoints, ["http://192.0.2.1:2379", "http://192.0.2.2:2379"]);
    assert_eq!((config.etcd.prefix.as_str(), config.lease_ttl), ("/other", Duration::from_secs(3600)));
    assert_eq!((config.iface, config.cleanup), (vec!["eth1".to_owned()], false));
}

#[test]
fn mistakes_in_the_file_are_named() {
    for (file, told) in [
        ("colour = 'red'", "there is no setting \"colour\"; there are node_name, store, etcd_endpoints"),
        ("cleanup = true", "there is no setting \"cleanup\""),
        ("lease_ttl = 'soon'", "from 5s to 8760h"),
        ("lease_ttl = ['1h']", "lease_ttl takes one value"),
        ("run_dir = 1.5", "run_dir is a float"),
        ("=", "TOML parse error"),
    ] {
        let error = load(&[], Some(file)).expect_err(file);
        assert!(error.contains(told) && error.contains("fabricd.toml"), "{file}: {error}");
    }
    let error = load(&["--config", "/nonexistent.toml"], None).expect_err("no file");
    assert!(error.starts_with("cannot read the settings in /nonexistent.toml"), "{error}");
}

#[test]
fn times_have_a_unit_and_are_whole_seconds_within_a_year() {
    for (text, seconds) in [
        ("5s", 5),
        ("90s", 90),
        ("+90s", 90),
        ("030m", 1800),
        ("24h", 86_400),
        ("8760h", 31_536_000),
        ("31536000s", 31_536_000),
        ("1h30m", 5400),
        ("1h 30m", 5400),
    ] {
        assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
    }
    for text in ["", "s", "90", "4s", "8761h", "-5m", "1500ms", "1.5", "1 month", "18446744073709551616s"] {
        let told = parse_duration(text).expect_err(text);
        assert_eq!(told, "expected a number and a unit, as in 90s, 30m or 24h; from 5s to 8760h", "{text}");
    }
}

#[test]
fn half_a_key_pair_is_refused() {
    for file in ["etcd_certfile = 'a.pem'", "etcd_keyfile = 'a.pem'", "etcd_username = 'root'"] {
        let error = load(&[], Some(file)).expect("each by itself is fine").etcd.options().expect_err(file).to_string();
        assert!(error.ends_with("give both or neither"), "{error}");
    }
    let both = load(&["--etcd-certfile", "a.pem"], Some("etcd_keyfile = 'b.pem'")).expect("valid");
    assert!(both.etcd.options().expect("complete").tls.client.is_some());
}

#[test]
fn endpoints_get_etcds_port_and_the_scheme_that_fits_the_certificates() {
    let urls = |args: &[&str]| load(args, None).expect("valid").etcd.options().map(|options| options.endpoints);
    let two = urls(&["--etcd-endpoints", "192.0.2.10,[2001:db8::1]"]).expect("addresses");
    assert_eq!(two, ["http://192.0.2.10:2379", "http://[2001:db8::1]:2379"]);
    let safe = urls(&["--etcd-endpoints", "etcd-1", "--etcd-cafile", "ca.pem"]).expect("an address");
    assert_eq!(safe, ["https://etcd-1:2379"]);
    let refused = urls(&["--etcd-endpoints", "192.0.2.10:x"]).expect_err("no port").to_string();
    assert!(refused.starts_with("--etcd-endpoints: \"192.0.2.10:x\" is no address of etcd"), "{refused}");
}

#[test]
fn all_of_etcd_is_no_prefix() {
    for prefix in ["", "/"] {
        let refused = load(&["--etcd-prefix", prefix], None).expect_err("no prefix").to_string();
        assert!(refused.contains("--etcd-prefix <PATH>': expected a path, as in /coreos.com/network"), "{refused}");
    }
}

#[test]
fn help_shows_every_setting_with_its_variable() {
    let help = Config::command().render_long_help().to_string();
    for arg in Config::command().get_arguments().filter(|arg| arg.get_id() != "cleanup" && !arg.is_hide_set()) {
        let variable = format!("FABRICD_{}", arg.get_id().as_str().to_uppercase());
        assert!(help.contains(&variable), "{variable}");
    }
}

/// What the package ships as an example: each setting, and none that there isn't.
#[test]
fn example_file_has_every_setting() {
    let example = include_str!("../../../deploy/systemd/fabricd.toml");
    let commented = |line: &str| line.starts_with('#') && !line.starts_with("# ") && line.len() > 1;
    let lines = example.lines().map(|line| if commented(line) { &line[1..] } else { line });
    let all = lines.collect::<Vec<_>>().join("\n");
    load(&[], Some(&all)).expect("valid when nothing is commented out");
    load(&[], Some(example)).expect("valid as it is shipped");
    let settings: toml::Table = all.parse().expect("TOML");
    let command = Config::command();
    for id in command.get_arguments().filter(|arg| !arg.is_hide_set()).map(|arg| arg.get_id().as_str()) {
        let expected = !["config", "cleanup", "help", "version"].contains(&id);
        assert_eq!(settings.contains_key(id), expected, "{id}");
    }
}

#[test]
fn help_shows_the_commands_and_they_show_themselves() {
    let help = load(&["--help"], None).expect_err("help");
    for command in ["pki", "install-cni", "help"] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{command} "))), "{command}: {help}");
    }
    for (words, usage) in [
        (&["help", "pki"][..], "Usage: fabricd pki <COMMAND>"),
        (&["help", "pki", "init"], "Usage: fabricd pki init"),
        (&["help", "install-cni"], "Usage: fabricd install-cni"),
    ] {
        let help = load(words, None).expect_err("help");
        assert!(help.contains(usage), "{words:?}: {help}");
    }
    // A command that doesn't come first is no daemon.
    let error = load(&["--node-name", "node-1", "pki", "init"], None).expect_err("refused");
    assert!(error.contains("cannot be used with"), "{error}");
}

#[test]
fn name_that_every_unnamed_machine_has_is_refused_by_default_and_warned_of_when_it_is_given() {
    for name in ["localhost\n", "Localhost.localdomain\n", "(none)\n", "\n", "localhost.example.com"] {
        let refused = name_of_host(name).expect_err(name).to_string();
        assert!(refused.contains("--node-name NAME"), "{refused}");
    }
    assert_eq!(name_of_host("Node-7.example.com\n").expect("a name").as_str(), "node-7.example.com");
    let given = load(&["--node-name", "localhost"], None).expect("a person said so");
    assert!(given.name_warning().is_some_and(|told| told.contains("--node-name")));
    assert_eq!(load(&["--node-name", "local"], None).expect("valid").name_warning(), None);
}

#[test]
fn node_name_comes_from_the_host() {
    let config = load(&[], None).expect("this host has a name");
    assert!(!config.node().as_str().is_empty());
}
