//! The checks of `fabricctl doctor` on a node that is broken in one way each: what the kernel has and the files of the
//! host are made up here. What takes a real kernel is in `lab_see.rs` and `lab_mesh.rs`.

mod broken;
mod findings;
mod node;
