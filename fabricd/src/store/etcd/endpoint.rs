//! The address of a member of etcd as an operator writes it, and as the client takes it.

use std::net::Ipv6Addr;

use axum::http::Uri;

/// etcd's port for clients (IANA).
const PORT: u16 = 2379;

/// Completes an address such as `192.0.2.10`, `etcd.example.com:2379`, `[2001:db8::1]` or `https://192.0.2.10/`: without a
/// scheme it gets `scheme`, without a port 2379, whatever the scheme's own port is.
///
/// # Errors
/// What is wrong with it, and how it would be right.
pub fn complete(text: &str, scheme: &str) -> Result<String, String> {
    let wrong = |why: &str| {
        format!(
            "{text:?} is no address of etcd: {why}; expected one such as http://192.0.2.10:2379, etcd.example.com or [2001:db8::1]"
        )
    };
    let (scheme, rest) = text.trim().split_once("://").unwrap_or((scheme, text.trim()));
    if !["http", "https"].contains(&scheme) {
        return Err(wrong(&format!("the scheme is {scheme}, not http or https")));
    }
    let authority = rest.trim_end_matches('/');
    if authority.is_empty() {
        return Err(wrong("there is no host"));
    }
    if authority.contains(['/', '?', '#', '@']) {
        return Err(wrong("there may be no path, query or user (see --etcd-prefix, --etcd-username)"));
    }
    // An IPv6 address without brackets, whose last part could be taken for a port.
    let authority = if authority.parse::<Ipv6Addr>().is_ok() { format!("[{authority}]") } else { authority.to_owned() };
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port.parse::<u16>().ok().filter(|port| *port != 0)),
        _ => (authority.as_str(), Some(PORT)),
    };
    let port = port.ok_or_else(|| wrong("the port is no number from 1 to 65535"))?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if bracketed.map_or(host.contains(':'), |host| host.parse::<Ipv6Addr>().is_err()) {
        return Err(wrong("an IPv6 address with a port needs brackets, as in [2001:db8::1]:2379"));
    }
    let url = format!("{scheme}://{host}:{port}");
    url.parse::<Uri>().map(|_| url).map_err(|error| wrong(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheme_and_port_are_completed() {
        for (text, url) in [
            ("127.0.0.1", "http://127.0.0.1:2379"),
            ("127.0.0.1:12379", "http://127.0.0.1:12379"),
            ("127.0.0.1/", "http://127.0.0.1:2379"),
            ("etcd.example.com", "http://etcd.example.com:2379"),
            ("etcd-1", "http://etcd-1:2379"),
            ("https://etcd.example.com/", "https://etcd.example.com:2379"),
            ("https://etcd.example.com:443", "https://etcd.example.com:443"),
            ("http://192.0.2.10:2379/", "http://192.0.2.10:2379"),
            ("2001:db8::1", "http://[2001:db8::1]:2379"),
            ("[2001:db8::1]", "http://[2001:db8::1]:2379"),
            ("[2001:db8::1]:12379", "http://[2001:db8::1]:12379"),
            ("https://[2001:db8::1]", "https://[2001:db8::1]:2379"),
            (" 192.0.2.10 ", "http://192.0.2.10:2379"),
        ] {
            assert_eq!(complete(text, "http").as_deref(), Ok(url));
        }
        assert_eq!(complete("192.0.2.10", "https").as_deref(), Ok("https://192.0.2.10:2379"));
    }

    #[test]
    fn what_is_no_address_is_refused_with_one_that_is() {
        for (text, why) in [
            ("", "there is no host"),
            ("http://", "there is no host"),
            ("192.0.2.10:", "the port is no number"),
            ("192.0.2.10:0", "the port is no number"),
            ("192.0.2.10:etcd", "the port is no number"),
            ("192.0.2.10:99999", "the port is no number"),
            ("ftp://192.0.2.10", "the scheme is ftp"),
            ("http://192.0.2.10:2379/v3", "no path"),
            ("http://root@192.0.2.10", "no path, query or user"),
            ("2001:db8::1:x:2379", "needs brackets"),
            ("[2001:db8::1", "needs brackets"),
            ("two words", "is no address of etcd"),
        ] {
            let told = complete(text, "http").expect_err(text);
            assert!(told.contains(why) && told.contains("http://192.0.2.10:2379"), "{text}: {told}");
        }
    }
}
