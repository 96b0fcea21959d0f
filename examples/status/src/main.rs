//! Asks the daemon of this node for its status, over its unix socket.

use fabric_proto::v1::{GetStatusRequest, fabric_client::FabricClient};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let socket = std::env::args().nth(1).unwrap_or_else(|| "/run/fabric/fabricd.sock".to_owned());
    let mut fabric = FabricClient::connect(format!("unix://{socket}")).await?;
    let status = fabric.get_status(GetStatusRequest {}).await?.into_inner();

    let state = if status.ready { "ready" } else { &status.reason };
    let subnets = status.lease.map_or_else(|| "no subnet".to_owned(), |lease| lease.subnets.join(", "));
    let (programmed, peers) = (status.peers_programmed, status.peers.len());
    println!("{}: {state}, {subnets}, {programmed} of {peers} peers programmed", status.node);
    Ok(())
}
