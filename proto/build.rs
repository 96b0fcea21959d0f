//! Generates the code from the protocol files, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let protos = ["fabric/v1/fabric.proto"];
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).open_files(protos)?;
    let descriptors = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("fabric.v1.bin");
    std::fs::write(descriptors, compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .type_attribute(".", "#[derive(serde::Serialize)]")
        .field_attribute("fabric.v1.Peer.state", "#[serde(serialize_with = \"crate::peer_state\")]")
        .compile_fds(compiler.file_descriptor_set())?;
    protos.iter().for_each(|proto| println!("cargo::rerun-if-changed={proto}"));
    Ok(())
}
