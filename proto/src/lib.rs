//! The gRPC API of fabricd: the code generated from `fabric/v1/*.proto`, where every field is explained.

/// The first version of the API. Fields are only ever added to it.
#[allow(clippy::all, clippy::missing_errors_doc, missing_docs, unused_qualifications, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("fabric.v1");

    /// The descriptors of this package, for the reflection service.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/fabric.v1.bin"));
}

/// In JSON a peer's state is the last word of its name, in lower case.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands out references")]
fn peer_state<S: serde::Serializer>(state: &i32, to: S) -> Result<S::Ok, S::Error> {
    let name = v1::PeerState::try_from(*state).unwrap_or_default().as_str_name();
    to.serialize_str(&name.trim_start_matches("PEER_STATE_").to_lowercase())
}
