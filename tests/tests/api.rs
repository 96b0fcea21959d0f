//! The gRPC API, served by the daemon's own code on what a test publishes: no kernel, no store.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fabric_core::handoff::{NotReady, Readiness};
use fabric_proto::v1;
use fabric_proto::v1::ask_nodes_request::Question;
use fabric_proto::v1::fabric_client::FabricClient;
use fabric_tests::certificates::Certificates;
use fabric_tests::served::{Served, view};
use fabricd::api::{self, Remote, Tls};
use fabricd::mesh::Mesh;
use fabricd::metrics::Metrics;
use fabricd::pki::Pki;
use fabricd::status::counters::Counters;
use fabricd::status::events::Kind;
use fabricd::{http, reconcile};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServiceResponse};

#[tokio::test]
async fn probes_tell_whether_the_loop_lives_and_pods_may_be_added() -> Result<()> {
    let api = Served::new(view(&[2])?, Mesh::default())?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(http::serve(listener, api.sources, Arc::new(Metrics::new(&Counters::default()))));
    let get_as = async |path: &str, accept: &str| -> Result<String> {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nAccept: {accept}\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer.replace("\r\n", " "))
    };
    let get = async |path: &str| get_as(path, "*/*").await;
    let numbers = get("/metrics").await?;
    assert!(numbers.contains("content-type: text/plain; version=0.0.4;"), "{numbers}");
    assert!(numbers.contains("# TYPE fabricd_passes_total counter") && !numbers.contains("# EOF"), "{numbers}");
    let numbers = get_as("/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5").await?;
    assert!(numbers.contains("content-type: application/openmetrics-text; version=1.0.0;"), "{numbers}");
    assert!(numbers.contains("# TYPE fabricd_passes counter") && numbers.ends_with("# EOF\n"), "{numbers}");

    assert!(get("/readyz").await?.starts_with("HTTP/1.0 200"));
    api.view.send_modify(|view| {
        let reason = "no lease".to_owned();
        Arc::make_mut(view).readiness = Readiness::NotReady { code: NotReady::Starting, reason };
    });
    let answer = get("/readyz").await?;
    assert!(answer.starts_with("HTTP/1.0 503") && answer.ends_with("not ready: no lease\n"), "{answer}");
    assert!(get("/healthz").await?.starts_with("HTTP/1.0 200"));
    drop(api.view);
    assert!(get("/healthz").await?.starts_with("HTTP/1.0 500"));
    Ok(())
}

async fn over(socket: &Path) -> Result<Channel> {
    let uri = format!("unix://{}", socket.display());
    Ok(Endpoint::new(uri)?.connect().await?)
}

#[tokio::test]
async fn api_answers_watches_and_keeps_others_out() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("fabricd.sock");
    let mut api = Served::new(view(&[2])?, Mesh::default())?;
    tokio::spawn(api::serve(api::listen(&socket)?, api.sources.clone()));
    assert_eq!(std::fs::metadata(&socket)?.permissions().mode() & 0o777, 0o600);
    let mut client = FabricClient::new(over(&socket).await?);

    lists_and_watches(&api, &mut client).await?;
    events_are_told(&api, &mut client).await?;
    kernel_state_is_asked_of_the_loop(&mut api, &mut client).await?;
    let settings = client.get_settings(v1::GetSettingsRequest {}).await?.into_inner();
    assert_eq!((settings.store.as_str(), settings.etcd_endpoints.len()), ("etcd", 1), "{settings:?}");
    let level = |level: &str| v1::SetLogLevelRequest { level: level.into() };
    assert_eq!(client.set_log_level(level("debug")).await?.into_inner().level, "debug");
    assert_eq!(client.set_log_level(level("loud")).await.unwrap_err().code(), Code::InvalidArgument);
    health_and_reflection_are_served(&socket).await?;
    tls_is_for_those_who_show_a_certificate_and_read_only(&api).await
}

async fn lists_and_watches(api: &Served, client: &mut FabricClient<Channel>) -> Result<()> {
    let peers = client.list_peers(v1::ListPeersRequest {}).await?.into_inner().peers;
    assert_eq!(peers.iter().map(|peer| peer.node.as_str()).collect::<Vec<_>>(), ["node-2"]);
    let leases = client.list_leases(v1::ListLeasesRequest {}).await?.into_inner();
    assert_eq!((leases.leases[0].epoch, leases.revision), (1, 7));

    let mut peers = client.watch_peers(v1::WatchPeersRequest {}).await?.into_inner();
    let mut leases = client.watch_leases(v1::WatchLeasesRequest {}).await?.into_inner();
    let own = leases.message().await?.and_then(|change| change.lease).context("this node's own lease")?;
    assert!(own.own, "{own:?}");
    for (publish, want) in [
        (None, (v1::ChangeType::Added, "node-2")),
        (Some(vec![2, 3]), (v1::ChangeType::Added, "node-3")),
        (Some(vec![3]), (v1::ChangeType::Removed, "node-2")),
    ] {
        if let Some(nodes) = publish {
            api.view.send_replace(Arc::new(view(&nodes)?));
        }
        let change = peers.message().await?.context("the stream goes on")?;
        assert_eq!((change.r#type(), change.peer.context("a peer")?.node.as_str()), want);
        let change = leases.message().await?.context("the stream goes on")?;
        assert_eq!((change.r#type(), change.lease.context("a lease")?.node.as_str()), want);
    }
    Ok(())
}

async fn events_are_told(api: &Served, client: &mut FabricClient<Channel>) -> Result<()> {
    let tell = |message: &str| api.sources.events.tell(Kind::Peer, "node-2", message, false);
    tell("came");
    let mut past = client.watch_events(v1::WatchEventsRequest { follow: false }).await?.into_inner();
    assert_eq!(past.message().await?.context("one is remembered")?.message, "came");
    assert!(past.message().await?.is_none(), "without follow it ends");
    let mut all = client.watch_events(v1::WatchEventsRequest { follow: true }).await?.into_inner();
    tell("went");
    for (number, message) in [(1, "came"), (2, "went")] {
        let event = all.message().await?.context("the stream goes on")?;
        assert_eq!((event.number, event.message.as_str()), (number, message));
    }
    Ok(())
}

async fn kernel_state_is_asked_of_the_loop(api: &mut Served, client: &mut FabricClient<Channel>) -> Result<()> {
    let answer = async {
        let Some(reconcile::Command::Snapshot { reply }) = api.network.recv().await else { panic!("not asked") };
        let snapshot =
            reconcile::Snapshot { wanted: None, observed: None, left: None, last: None, blocked: "no lease".into() };
        reply.send(snapshot).expect("somebody waits");
    };
    let request = v1::GetKernelStateRequest { entries: true };
    let (state, ()) = tokio::join!(client.get_kernel_state(request), answer);
    let state = state?.into_inner();
    assert_eq!((state.desired, state.blocked.as_str()), (None, "no lease"));
    Ok(())
}

async fn health_and_reflection_are_served(socket: &Path) -> Result<()> {
    let service = "fabric.v1.Fabric".to_owned();
    let mut health = HealthClient::new(over(socket).await?);
    let health = health.check(HealthCheckRequest { service: service.clone() }).await?.into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);

    let ask = |question| ServerReflectionRequest { host: String::new(), message_request: Some(question) };
    let questions = [MessageRequest::ListServices(String::new()), MessageRequest::FileContainingSymbol(service)];
    let mut reflection = ServerReflectionClient::new(over(socket).await?);
    let questions = tokio_stream::iter(questions.map(ask));
    let mut answers = reflection.server_reflection_info(questions).await?.into_inner();
    let answer = answers.message().await?.and_then(|answer| answer.message_response).context("an answer")?;
    let MessageResponse::ListServicesResponse(listed) = answer else { anyhow::bail!("another answer: {answer:?}") };
    let named = |name: &str| listed.service.contains(&ServiceResponse { name: name.into() });
    assert!(named("fabric.v1.Fabric") && named("grpc.health.v1.Health"), "{listed:?}");
    let answer = answers.message().await?.and_then(|answer| answer.message_response).context("an answer")?;
    assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{answer:?}");
    Ok(())
}

/// `fabricd pki` with these words: it brings a runtime of its own.
fn pki(words: &[&str]) -> Result<()> {
    let line: Vec<std::ffi::OsString> = ["fabricd", "pki"].iter().chain(words).map(Into::into).collect();
    let pki = Pki::asked(line).context("the words for it")?;
    std::thread::spawn(|| pki.run()).join().map_err(|_| anyhow::anyhow!("fabricd pki has panicked"))?
}

#[tokio::test]
async fn certificates_that_come_later_or_change_are_used_by_the_next_connection() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    let text = |name: &str| path(name).display().to_string();
    let tls = |folder: &str| {
        Tls::new(&path(folder).join("ca.crt"), &path(folder).join("node.crt"), &path(folder).join("node.key"))
    };
    let mut api = Served::new(view(&[2])?, Mesh::default())?;
    let listener = api::listen_tcp("[::]:0".parse()?)?;
    let port = listener.local_addr()?.port();
    assert!(TcpStream::connect(("::1", port)).await.is_ok(), "both families");
    tokio::spawn(api::serve_tls(listener, tls("node-1"), api.sources.clone()));
    // node-1 asks as node-2 would: its lease's VTEP is an address of this machine.
    api.sources.remote = Remote { access: Some((tls("node-2"), port)) };
    let lease = api.view.borrow().leases.iter().flat_map(|leases| leases.iter()).next().cloned().context("a lease")?;
    let asks = async || {
        let question = Question::Status(v1::GetStatusRequest {});
        api.sources.remote.ask(lease.clone(), question, Duration::from_secs(10)).await.error
    };
    let error = asks().await;
    assert!(error.contains("node-2/ca.crt, which fabricd pki node makes: No such file"), "{error}");

    let issue =
        |authority: &str, node: &str| pki(&["node", "--ca", &text(authority), "--name", node, "--out", &text(node)]);
    pki(&["ca", "--out", &text("ca")])?;
    issue("ca", "node-2")?;
    let error = asks().await;
    assert!(!error.is_empty(), "node-1 has none yet");
    issue("ca", "node-1")?;
    assert_eq!(asks().await, "");

    // Another authority: whoever has no certificate of it any more is kept out, and let in when he has one.
    pki(&["ca", "--out", &text("another")])?;
    issue("another", "node-1")?;
    let error = asks().await;
    assert!(error.contains("certificate"), "{error}");
    issue("another", "node-2")?;
    assert_eq!(asks().await, "");
    Ok(())
}

async fn tls_is_for_those_who_show_a_certificate_and_read_only(api: &Served) -> Result<()> {
    let ours = Certificates::create_for(&[("node-1", "DNS:node-1"), ("node-2", "DNS:node-2")])?;
    let strangers = Certificates::create_for(&[("node-2", "DNS:node-2")])?;
    let (certificate, key) = ours.pair("node-1");
    let tls = Tls::new(&ours.ca(), &certificate, &key);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let sources = api.sources.clone();
    tokio::spawn(async move { api::serve_tls(listener, tls, sources).await });

    let ask = async |identity: Option<&Certificates>, name: &str| -> Result<FabricClient<Channel>> {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(ours.ca())?));
        tls = tls.domain_name(name);
        if let Some(of) = identity {
            let (certificate, key) = of.pair("node-2");
            tls = tls.identity(Identity::from_pem(std::fs::read(certificate)?, std::fs::read(key)?));
        }
        let mut client =
            FabricClient::new(Channel::from_shared(format!("https://{address}"))?.tls_config(tls)?.connect().await?);
        client.get_status(v1::GetStatusRequest {}).await?;
        Ok(client)
    };
    assert!(ask(None, "node-1").await.is_err(), "without a certificate");
    assert!(ask(Some(&strangers), "node-1").await.is_err(), "with one of another authority");
    assert!(ask(Some(&ours), "node-3").await.is_err(), "this is node-1");
    let mut client = ask(Some(&ours), "node-1").await?;
    let code = |answer: Result<_, tonic::Status>| answer.err().map(|status| status.code());
    let refused = client.set_log_level(v1::SetLogLevelRequest { level: "debug".into() }).await.map(drop);
    assert_eq!(code(refused), Some(Code::PermissionDenied));
    let refused = client.get_settings(v1::GetSettingsRequest {}).await.map(drop);
    assert_eq!(code(refused), Some(Code::PermissionDenied));
    let refused = client.renumber_lease(v1::RenumberLeaseRequest { force: true }).await.map(drop);
    assert_eq!(code(refused), Some(Code::PermissionDenied));
    let refused = client.migrate_network(v1::MigrateNetworkRequest {}).await.map(drop);
    assert_eq!(code(refused), Some(Code::PermissionDenied));
    assert!(Tls::of([Some(&ours.ca()), None, None]).is_err(), "half of the files");
    Ok(())
}
