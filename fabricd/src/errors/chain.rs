//! Errors with their causes in one line: `cannot read the settings in FILE: No such file or directory (os error 2)`.

/// An error and its causes, each once. Errors of others often have their cause in their own words and name it as their source
/// too, so `{:#}` would say it twice.
#[must_use]
pub fn chain(error: &anyhow::Error) -> String {
    let mut told = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if told.is_empty() {
            told = cause;
        } else if !told.contains(&cause) {
            told = format!("{told}: {cause}");
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::Context as _;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("failed to read it: {0}")]
    struct Twice(#[source] io::Error);

    #[test]
    fn each_cause_is_told_once() {
        let gone = || io::Error::from_raw_os_error(libc::ENOENT);
        let words = "No such file or directory (os error 2)";
        let error = Err::<(), _>(Twice(gone())).context("cannot use the kubeconfig").expect_err("it was one");
        assert_eq!(chain(&error), format!("cannot use the kubeconfig: failed to read it: {words}"));
        assert_eq!(chain(&anyhow::Error::new(gone()).context("cannot look")), format!("cannot look: {words}"));
        assert_eq!(chain(&anyhow::anyhow!("alone")), "alone");
    }
}
