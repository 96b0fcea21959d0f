//! The way to etcd: one endpoint at a time, the next one when it fails.
//!
//! etcd-client can balance over many endpoints, but keeps picking dead ones; a request then fails one time in two. Here
//! each connection has one endpoint. A request that fails on it, in a way that says nothing about the request, drops it
//! and is sent again over the next endpoint at once. Certificates are read anew for every connection, so rotated ones
//! are taken up.

use std::error::Error as _;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, Error, GetResponse, Identity as KeyPair, LeaseGrantResponse, ResponseHeader,
    TlsOptions, TxnResponse,
};
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};
use tonic::Code;
use tracing::debug;

use super::identity::{Identity, Seen};
use crate::store::StoreError;

/// How often an idle connection is probed, and how long the answer may take at least: one that died without a word is
/// found after the sum of both. etcd hangs up on clients that probe more often than every 5 s
/// (`--grpc-keepalive-min-time`). An etcd with much to do answers late, and each connection that is given up costs it a
/// list of all leases more: with 3 s for an answer, 1,200 nodes that joined at once on two busy cores gave up 500 times.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(6), Duration::from_secs(12));

/// The longest that an answer is waited for. A store that is late with all its answers has too much to do, and what is
/// sent again because it was late is more of it: of 800 nodes that joined at once on two busy cores some had no lease
/// after 150 s when each request was given up after 3 s, and all after 60 s when late ones got more time.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What a TLS server that shuts the door looks like from outside.
const TURNED_AWAY: [&str; 4] = ["connection closed", "fatal alert", "reset by peer", "broken pipe"];

/// Where etcd is and how to get in.
#[derive(Clone, Debug)]
pub struct Options {
    /// URLs of the members, such as `https://192.0.2.10:2379`, at least one.
    pub endpoints: Vec<String>,
    /// What all keys begin with.
    pub prefix: String,
    /// Certificates, for endpoints with `https`.
    pub tls: Tls,
    /// User and password, if etcd has authentication enabled.
    pub user: Option<User>,
    /// How long one request may take on one endpoint at first.
    pub request_timeout: Duration,
}

impl Options {
    /// flannel's prefix, and ours.
    pub const DEFAULT_PREFIX: &str = "/coreos.com/network";

    /// These endpoints, and the default of everything else.
    #[must_use]
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            prefix: Self::DEFAULT_PREFIX.to_owned(),
            tls: Tls::default(),
            user: None,
            request_timeout: Duration::from_secs(3),
        }
    }
}

/// Certificate files, PEM.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    /// The authority that signed etcd's certificates.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key, when etcd asks for one.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// An etcd user.
#[derive(Clone)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Its password.
    pub password: String,
}

impl std::fmt::Debug for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("User").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A response that says which store it is from.
pub(super) trait Answer {
    fn header(&self) -> Option<&ResponseHeader>;
}

impl Answer for GetResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Answer for TxnResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Answer for LeaseGrantResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl<T: Answer> Answer for Option<T> {
    fn header(&self) -> Option<&ResponseHeader> {
        self.as_ref().and_then(Answer::header)
    }
}

/// Sends requests to whichever endpoint answers.
pub(super) struct Connector {
    options: Options,
    current: Mutex<Current>,
    /// How often all connections were given up.
    given_up: watch::Sender<u64>,
    /// How many answers in a row were late: each doubles the time that the next one has.
    late: AtomicU32,
    pub(super) identity: Identity,
}

struct Current {
    /// Counts the connections; its remainder is the endpoint.
    turn: usize,
    client: Option<Client>,
    /// Of how many times that all were given up it has come after.
    made_after: u64,
}

/// Why one attempt did not work.
enum Failure {
    /// It says nothing about the request: another endpoint may do it.
    Connection(String),
    /// The store has decided.
    Refused { operation: &'static str, reason: String },
}

impl Connector {
    pub(super) fn new(options: Options) -> Self {
        // Nodes spread over the members.
        let turn = fastrand::usize(..options.endpoints.len().max(1));
        Self {
            options,
            current: Mutex::new(Current { turn, client: None, made_after: 0 }),
            given_up: watch::Sender::new(0),
            late: AtomicU32::new(0),
            identity: Identity::new(),
        }
    }

    /// Gives up all connections, with what is under way on them: it is sent again over another one. For when the address
    /// that they are from has gone: the kernel keeps them, and no answer will ever come.
    pub(super) fn give_up(&self) {
        self.given_up.send_modify(|times| *times += 1);
    }

    /// Rises with each [`Connector::give_up`].
    pub(super) fn given_up(&self) -> watch::Receiver<u64> {
        self.given_up.subscribe()
    }

    /// All endpoints, for people.
    pub(super) fn endpoints(&self) -> String {
        self.options.endpoints.join(", ")
    }

    /// Sends a linearizable request, as [`Connector::send`], and tells what is known of the store that answered.
    pub(super) async fn ask<T, F>(
        &self,
        operation: &'static str,
        request: impl Fn(Client) -> F,
    ) -> Result<(T, Seen), StoreError>
    where
        T: Answer,
        F: Future<Output = Result<T, Error>>,
    {
        let before = self.identity.seen();
        let answer = self.send(operation, request).await?;
        let seen = answer.header().map_or(before, |header| self.identity.check(before, header));
        Ok((answer, seen))
    }

    /// Sends a request to one endpoint after the other until one answers. It may be carried out more than once: an
    /// endpoint can do what it is asked and die before it says so.
    pub(super) async fn send<T, F>(
        &self,
        operation: &'static str,
        request: impl Fn(Client) -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut reason = String::new();
        // One attempt more than there are endpoints: the first may go to a connection that died unnoticed.
        for _ in 0..=self.options.endpoints.len() {
            match self.attempt(operation, &request).await {
                Ok(answer) => return Ok(answer),
                Err(Failure::Refused { operation, reason }) => return Err(StoreError::Refused { operation, reason }),
                Err(Failure::Connection(why)) => reason = why,
            }
        }
        Err(StoreError::Unreachable { endpoints: self.endpoints(), reason })
    }

    async fn attempt<T, F>(&self, operation: &'static str, request: &impl Fn(Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut given_up = self.given_up();
        let (turn, client) = self.client().await?;
        let (limit, asked) = (self.limit(), Instant::now());
        let answered = tokio::select! {
            answered = timeout(limit, request(client)) => answered,
            Ok(()) = given_up.changed() => {
                return Err(Failure::Connection("the address that the connection was from has gone".into()));
            }
        };
        let failure = match answered {
            Ok(Ok(answer)) => {
                if asked.elapsed() <= self.options.request_timeout {
                    self.late.store(0, Ordering::Relaxed);
                }
                return Ok(answer);
            }
            Ok(Err(error)) => failure(operation, &error),
            Err(_) => {
                self.late.fetch_add(1, Ordering::Relaxed);
                Failure::Connection(format!("{} did not answer within {limit:?}", self.endpoint(turn)))
            }
        };
        let failure = self.explain(turn, failure);
        if let Failure::Connection(error) = &failure {
            debug!(endpoint = self.endpoint(turn), op = operation, error, "etcd endpoint failed");
            self.leave(turn).await;
        }
        Err(failure)
    }

    /// How long the next answer may take.
    pub(super) fn limit(&self) -> Duration {
        let first = self.options.request_timeout;
        first.saturating_mul(1 << self.late.load(Ordering::Relaxed).min(8)).min(LONGEST_WAIT.max(first))
    }

    /// Adds the way out where etcd doesn't say: a client whose certificate it doesn't like, or misses, it turns away by
    /// closing the connection, and the alert that tells why is often lost in that.
    fn explain(&self, turn: usize, failure: Failure) -> Failure {
        let turned_away = |reason: &str| TURNED_AWAY.iter().any(|sign| reason.to_lowercase().contains(sign));
        match failure {
            Failure::Connection(reason) if self.endpoint(turn).starts_with("https://") && turned_away(&reason) => {
                let hint = match self.options.tls.client {
                    None => "does etcd ask for a client certificate?",
                    Some(_) => "is the client certificate one that etcd trusts?",
                };
                Failure::Connection(format!("{reason}; {hint}"))
            }
            other => other,
        }
    }

    fn endpoint(&self, turn: usize) -> &str {
        self.options.endpoints.get(turn % self.options.endpoints.len().max(1)).map_or("", String::as_str)
    }

    /// The connection, made if there is none. It answers to the number that comes with it.
    async fn client(&self) -> Result<(usize, Client), Failure> {
        let mut current = self.current.lock().await;
        let given_up = *self.given_up.borrow();
        if current.made_after != given_up {
            (current.client, current.made_after) = (None, given_up);
        }
        if let Some(client) = &current.client {
            return Ok((current.turn, client.clone()));
        }
        let endpoint = self.endpoint(current.turn);
        if endpoint.is_empty() {
            return Err(Failure::Connection("no endpoint is configured".into()));
        }
        let limit = self.options.request_timeout;
        // Only a log-in sends something here; without a user the first request connects.
        let connecting = async {
            let options = self.connect_options(endpoint).await?;
            Client::connect([endpoint], Some(options)).await.map_err(|error| match error {
                Error::InvalidUri(_) | Error::InvalidArgs(_) => Failure::Connection(format!("{endpoint}: {error}")),
                error => failure("authenticate the user", &error),
            })
        };
        let connected = timeout(limit, connecting)
            .await
            .unwrap_or_else(|_| Err(Failure::Connection(format!("{endpoint} did not answer within {limit:?}"))));
        match connected {
            Ok(client) => {
                current.client = Some(client.clone());
                Ok((current.turn, client))
            }
            Err(failure) => {
                current.turn += 1;
                Err(failure)
            }
        }
    }

    /// Gives a connection up, unless somebody else already did.
    async fn leave(&self, turn: usize) {
        let mut current = self.current.lock().await;
        if current.turn == turn {
            (current.turn, current.client) = (turn + 1, None);
        }
    }

    async fn connect_options(&self, endpoint: &str) -> Result<ConnectOptions, Failure> {
        let Options { tls, user, request_timeout, .. } = &self.options;
        let mut options = ConnectOptions::new()
            .with_keep_alive(KEEPALIVE.0, KEEPALIVE.1.max(*request_timeout))
            .with_keep_alive_while_idle(true)
            .with_connect_timeout(*request_timeout)
            .with_require_leader(true);
        if let Some(User { name, password }) = user {
            options = options.with_user(name, password).with_auto_token_refresh(true);
        }
        if !endpoint.starts_with("https://") {
            return Ok(options);
        }
        let Some(ca) = &tls.ca else {
            return Err(Failure::Connection(format!("{endpoint} needs the CA certificate that etcd's is signed with")));
        };
        let mut with = TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca).await?));
        if let Some((certificate, key)) = &tls.client {
            with = with.identity(KeyPair::from_pem(read(certificate).await?, read(key).await?));
        }
        Ok(options.with_tls(with))
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    tokio::fs::read(path).await.map_err(|error| Failure::Connection(format!("cannot read {}: {error}", path.display())))
}

/// Tells an answer from an accident. `Unavailable`, `DeadlineExceeded` and `Unknown` are accidents: no leader, a member
/// that stops, a connection that breaks.
fn failure(operation: &'static str, error: &Error) -> Failure {
    let refused = match error {
        // An old log-in says nothing about the request. A new connection logs in anew.
        Error::GRpcStatus(status) if status.message().contains("invalid auth token") => false,
        Error::GRpcStatus(status) => match status.code() {
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated => true,
            Code::Unknown => status.message().starts_with("etcdserver:"),
            _ => false,
        },
        _ => false,
    };
    let reason = reason(error);
    if refused { Failure::Refused { operation, reason } } else { Failure::Connection(reason) }
}

/// What an error of etcd-client says at its root: `Connection refused (os error 111)` lies three causes deep.
pub(super) fn reason(error: &Error) -> String {
    let Error::GRpcStatus(status) = error else { return error.to_string() };
    let mut root = status.source();
    while let Some(deeper) = root.and_then(|cause| cause.source()) {
        root = Some(deeper);
    }
    match root.map(ToString::to_string) {
        Some(root) if !status.message().contains(&root) => format!("{}: {root}", status.message()),
        _ => status.message().to_owned(),
    }
}

/// True for the answer that a lease exists already.
pub(super) fn lease_is_there(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains("lease already exists"))
}

/// True for the answer that a lease doesn't exist (any more).
pub(super) fn lease_is_gone(error: &Error) -> bool {
    match error {
        Error::GRpcStatus(status) => status.code() == Code::NotFound && status.message().contains("lease not found"),
        // etcd-client's own words when the first response says that the lease has no time to live.
        Error::LeaseKeepAliveError(message) => message == "lease not found",
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test]
    async fn request_on_a_connection_whose_address_is_gone_is_sent_over_another_at_once() {
        let options =
            Options { request_timeout: Duration::from_secs(3600), ..Options::new(vec!["http://[::1]:1".into()]) };
        let connector = Connector::new(options);
        let attempts = AtomicU32::new(0);
        // The first is never answered.
        let request = |_| {
            let first = attempts.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                if first {
                    std::future::pending::<()>().await;
                }
                Ok(())
            }
        };
        let gone = async {
            while attempts.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
            connector.give_up();
        };
        let both = async { tokio::join!(connector.send("read", request), gone).0 };
        timeout(Duration::from_secs(60), both).await.expect("not waited for").expect("answered");
        assert_eq!(attempts.load(Ordering::Relaxed), 2);
        assert_eq!(connector.limit(), Duration::from_secs(3600), "nothing was late");
    }

    #[tokio::test(start_paused = true)]
    async fn answer_that_is_late_has_twice_the_time_when_it_is_asked_for_again() {
        let connector = Connector::new(Options::new(vec!["http://192.0.2.1:2379".into()]));
        let takes = async |seconds| {
            let answer = |_| async move {
                sleep(Duration::from_secs(seconds)).await;
                Ok(())
            };
            connector.send("read", answer).await.map_err(|error| error.to_string())
        };
        assert_eq!(connector.limit(), Duration::from_secs(3));
        takes(5).await.expect("late at first, in time when it is asked for again");
        assert_eq!(connector.limit(), Duration::from_secs(6), "it was late all the same");
        takes(2).await.expect("in time");
        assert_eq!(connector.limit(), Duration::from_secs(3));

        let told = takes(60).await.expect_err("too late for both");
        assert!(told.contains("did not answer within 6s"), "{told}");
        for _ in 0..9 {
            let _ = takes(60).await;
        }
        assert_eq!(connector.limit(), LONGEST_WAIT);
    }
}
