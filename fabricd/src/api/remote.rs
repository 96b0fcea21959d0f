//! Questions to the daemons of other nodes, through the fabric: to their VTEP's address, over TLS.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::leases::Lease;
use fabric_core::model::NodeName;
use fabric_proto::v1;
use fabric_proto::v1::ask_nodes_request::Question;
use fabric_proto::v1::fabric_client::FabricClient;
use fabric_proto::v1::node_answer::Answer;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};

use super::tls::Tls;
use crate::errors::chain;
use crate::errors::errno;

/// How long a node may take unless it is told otherwise.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// The largest answer that is read, in bytes: the status of a node with 5,000 peers is 1 million.
const LARGEST: usize = 16 << 20;

/// How other daemons are reached.
#[derive(Clone)]
pub struct Remote {
    /// Our certificate, and the port that the others listen at: the same as ours.
    pub access: Option<(Tls, u16)>,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").field("port", &self.access.as_ref().map(|(_, port)| port)).finish()
    }
}

/// What is missing when nodes can't ask each other.
pub const NO_ACCESS: &str = "nodes don't ask each other here: fabricd needs --api-addr, --api-cafile, --api-certfile \
                             and --api-keyfile, on all nodes, with one port; docs/pki.md has the recipe";

impl Remote {
    /// Asks one node; without an answer the reason is in it.
    pub async fn ask(&self, lease: Arc<Lease>, question: Question, patience: Duration) -> v1::NodeAnswer {
        let begin = Instant::now();
        let answer = match lease.record.node() {
            None => Err("a flannel node has nothing to ask".to_owned()),
            Some(node) => match timeout(patience, self.call(node, &lease, question)).await {
                Err(_) => Err(format!("no answer within {:.1} s", patience.as_secs_f64())),
                Ok(answer) => answer,
            },
        };
        let took_ms = begin.elapsed().as_secs_f64() * 1e3;
        let (answer, error) = answer.map_or_else(|error| (None, error), |answer| (Some(answer), String::new()));
        v1::NodeAnswer { node: lease.holder(), error, took_ms, answer }
    }

    async fn call(&self, node: &NodeName, lease: &Lease, question: Question) -> Result<Answer, String> {
        let mut client = self.client(node, lease).await?;
        let told = |status: tonic::Status| status.message().to_owned();
        Ok(match question {
            Question::Status(request) => Answer::Status(client.get_status(request).await.map_err(told)?.into_inner()),
            Question::Mesh(request) => Answer::Mesh(client.get_mesh(request).await.map_err(told)?.into_inner()),
            Question::Explain(request) => Answer::Explain(client.explain(request).await.map_err(told)?.into_inner()),
            Question::Diagnose(request) => {
                let mut stream = client.diagnose(request).await.map_err(told)?.into_inner();
                let mut checks = vec![];
                while let Some(check) = stream.message().await.map_err(told)? {
                    checks.push(check);
                }
                Answer::Checks(v1::Checks { checks })
            }
        })
    }

    async fn client(&self, node: &NodeName, lease: &Lease) -> Result<FabricClient<Channel>, String> {
        let (tls, port) = self.access.as_ref().ok_or(NO_ACCESS)?;
        let address = lease.key.subnets().values().next().ok_or("it has no subnet")?.base();
        let told = |error: tonic::transport::Error| {
            // What is at the bottom of it says most: that a certificate is not valid, or that nobody listens.
            let causes = std::iter::successors(error.source(), |&cause: &&(dyn Error + 'static)| cause.source());
            match causes.last() {
                None => error.to_string(),
                Some(cause) => match cause.downcast_ref::<io::Error>().filter(|io| io.raw_os_error().is_some()) {
                    Some(io) => format!("cannot connect to {address} port {port}: {}", errno::named(io)),
                    None => format!("{error}: {cause}"),
                },
            }
        };
        let tls = tls.client(node).map_err(|error| chain(&error))?;
        let endpoint = Endpoint::new(format!("https://{}", std::net::SocketAddr::new(address, *port))).map_err(told)?;
        let channel = endpoint.tls_config(tls).map_err(told)?.connect().await.map_err(told)?;
        Ok(FabricClient::new(channel).max_decoding_message_size(LARGEST))
    }
}
