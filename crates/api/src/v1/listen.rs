//! Where a VM listens for people and programs of the host.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A socket of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Listen {
    /// A Unix socket that only its owner can connect to.
    Unix(PathBuf),
    /// An address of the host's loopback.
    Tcp(SocketAddr),
}

impl Listen {
    /// `risk`: why nobody else should come through the field at `path`.
    pub(super) fn validate(&self, path: &str, risk: &str, bad: &mut dyn FnMut(String, String)) {
        match self {
            // sockaddr_un.sun_path.
            Listen::Unix(p) if p.as_os_str().is_empty() || p.as_os_str().len() > 100 => bad(
                path.into(),
                "expected a socket path of at most 100 bytes".into(),
            ),
            Listen::Tcp(a) if !a.ip().is_loopback() => bad(
                path.into(),
                format!(
                    "{a} can be reached from other hosts, and {risk}; listen on 127.0.0.1 and \
                     forward the port through ssh"
                ),
            ),
            _ => {}
        }
    }
}
