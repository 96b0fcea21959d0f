//! What of the kernel must be so that Services work, beside their table: how connection tracking takes TCP.

use std::fs;
use std::io;
use std::path::Path;

/// Takes packets of TCP beyond the window for such of their connection: conntrack would call them invalid, they would go
/// untranslated, and the client would reset the connection.
///
/// # Errors
/// The setting can't be written, with the way out.
pub fn be_liberal(sysctl_root: &Path) -> Result<(), String> {
    let file = sysctl_root.join("netfilter/nf_conntrack_tcp_be_liberal");
    match fs::read_to_string(&file) {
        Ok(value) if value.trim() == "1" => Ok(()),
        // As long as no connection is tracked there is no such setting.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => fs::write(&file, "1").map_err(|error| {
            let set = "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1";
            format!("cannot write {}: {error}; mount it writable, or set it on the host with: {set}", file.display())
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_is_written_once_it_is_there() {
        let root = tempfile::tempdir().expect("a folder");
        assert_eq!(be_liberal(root.path()), Ok(()), "no connection is tracked yet");
        fs::create_dir(root.path().join("netfilter")).expect("a folder");
        let file = root.path().join("netfilter/nf_conntrack_tcp_be_liberal");
        fs::write(&file, "0\n").expect("written");
        assert_eq!(be_liberal(root.path()), Ok(()));
        assert_eq!(fs::read_to_string(file).expect("readable"), "1");
    }
}
