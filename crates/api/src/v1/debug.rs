//! Debugging of a guest from outside.

use serde::{Deserialize, Serialize};

use super::Listen;

/// A GDB stub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GdbSpec {
    /// Where debuggers connect.
    pub listen: Listen,
    /// The guest stands still until a debugger lets it go on.
    #[serde(default)]
    pub wait: bool,
}

impl GdbSpec {
    pub(super) fn validate(&self, bad: &mut dyn FnMut(String, String)) {
        let risk = "whoever connects can do anything to the guest";
        self.listen.validate("gdb.listen", risk, bad);
    }
}
