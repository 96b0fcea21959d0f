//! The gRPC API of fabricd: the code generated from `fabric/v1/*.proto`, where every field is explained.

/// The first version of the API. Fields are only ever added to it.
#[allow(clippy::all, clippy::missing_errors_doc, missing_docs, unused_qualifications, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("fabric.v1");

    /// The descriptors of this package, for the reflection service.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/fabric.v1.bin"));
}

/// An enum of the API, as people and programs read it.
pub trait Word: TryFrom<i32> + Default {
    /// Its name without that of its type, in lower case: `pending` for `PEER_STATE_PENDING`.
    fn word(self) -> String;
}

macro_rules! words {
    ($($kind:ident $prefix:literal),*) => {
        $(impl Word for v1::$kind {
            fn word(self) -> String {
                self.as_str_name().trim_start_matches($prefix).to_lowercase()
            }
        })*
    };
}
words!(
    PeerState "PEER_STATE_",
    ChangeType "CHANGE_TYPE_",
    EventKind "EVENT_KIND_",
    MeshCause "MESH_CAUSE_",
    CheckResult "CHECK_RESULT_",
    ServiceAddressKind "SERVICE_ADDRESS_KIND_"
);

/// In JSON an enum is its word; a number that this version doesn't know is `unspecified`.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands out references")]
fn word<W: Word, S: serde::Serializer>(value: &i32, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&W::try_from(*value).unwrap_or_default().word())
}
