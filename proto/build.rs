//! Generates the code from the protocol files, without protoc.

/// The enums, by the fields that hold one: in JSON they are words.
const ENUMS: [(&str, &str); 9] = [
    ("Peer.state", "PeerState"),
    ("Peer.mesh", "MeshCause"),
    ("PeerEvent.type", "ChangeType"),
    ("LeaseEvent.type", "ChangeType"),
    ("Event.kind", "EventKind"),
    ("MeshPeer.cause", "MeshCause"),
    ("Check.result", "CheckResult"),
    ("Hop.result", "CheckResult"),
    ("ServiceFrontend.kind", "ServiceAddressKind"),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = ["diagnosis", "events", "fabric", "kernel", "leases", "mesh", "policy", "service", "services"];
    let protos = protos.map(|name| format!("fabric/v1/{name}.proto"));
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).open_files(&protos)?;
    let descriptors = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("fabric.v1.bin");
    std::fs::write(descriptors, compiler.encode_file_descriptor_set())?;
    let mut builder = tonic_prost_build::configure().type_attribute(".", "#[derive(serde::Serialize)]");
    for (field, kind) in ENUMS {
        let attribute = format!("#[serde(serialize_with = \"crate::word::<{kind}, _>\")]");
        builder = builder.field_attribute(format!("fabric.v1.{field}"), attribute);
    }
    builder.compile_fds(compiler.file_descriptor_set())?;
    protos.iter().for_each(|proto| println!("cargo::rerun-if-changed={proto}"));
    Ok(())
}
