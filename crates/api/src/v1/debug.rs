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

/// How a guest can say that it has panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PvpanicBus {
    /// A port, of which ACPI tables tell.
    Isa,
    /// A PCI function.
    Pci,
}

/// What a guest's panic does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PanicAction {
    /// The VM ends.
    #[default]
    Exit,
    /// The VM stands still, to be looked at.
    Pause,
    /// The guest goes on, to reset or to dump itself.
    Continue,
}

/// A pvpanic device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PvpanicSpec {
    /// How it is connected.
    pub bus: PvpanicBus,
    /// What a panic does.
    #[serde(default)]
    pub action: PanicAction,
}
