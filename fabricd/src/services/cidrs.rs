//! The prefixes that ClusterIPs are from, as the API server says since Kubernetes 1.33 (`ServiceCIDR`, KEP-1880).

use std::sync::Arc;
use std::time::Duration;

use fabric_core::model::Subnet;
use kube::api::ListParams;
use kube::core::Request;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::debug;

use crate::kubernetes::client::{ApiError, ApiServer};

/// How often they are asked for. They change when an administrator adds one.
const EVERY: Duration = Duration::from_secs(60);
/// How often where there are none to be asked for: an older API server, or no right to.
const SELDOM: Duration = Duration::from_secs(600);

#[derive(Deserialize)]
struct List {
    items: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    #[serde(default)]
    spec: Spec,
}

#[derive(Default, Deserialize)]
struct Spec {
    #[serde(default)]
    cidrs: Vec<String>,
}

/// Asks for them again and again. An API server that is away leaves those that are known.
pub(super) async fn poll(api: Arc<ApiServer>, known: watch::Sender<Vec<Subnet>>) {
    loop {
        let pause = match list(&api).await {
            Ok(cidrs) => {
                known.send_if_modified(|before| {
                    let differ = *before != cidrs;
                    *before = cidrs;
                    differ
                });
                EVERY
            }
            Err(error @ ApiError::Refused { .. }) => {
                debug!(%error, "ServiceCIDRs are not known");
                SELDOM
            }
            Err(ApiError::Unreachable(_)) => EVERY,
        };
        sleep(pause).await;
    }
}

async fn list(api: &ApiServer) -> Result<Vec<Subnet>, ApiError> {
    let request = Request::new("/apis/networking.k8s.io/v1/servicecidrs").list(&ListParams::default());
    let request = request.map_err(|error| ApiError::new("list", &kube::Error::BuildRequest(error)))?;
    let list: List = api.client().await?.request(request).await.map_err(|error| ApiError::new("list", &error))?;
    let mut cidrs: Vec<Subnet> =
        list.items.iter().flat_map(|item| &item.spec.cidrs).filter_map(|cidr| cidr.parse().ok()).collect();
    cidrs.sort_unstable();
    cidrs.dedup();
    Ok(cidrs)
}
