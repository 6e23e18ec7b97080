//! What a device tells the machine as a whole.

/// Events that concern the whole machine. Called with the device locked, on the thread that made
/// the access; the machine notes the event and acts later, elsewhere.
pub trait MachineEvents: Send + Sync {
    /// The guest switched the power off (ACPI S5).
    fn power_off(&self);
    /// The guest asked for a reset of the machine.
    fn reset(&self);
    /// The guest went to sleep (ACPI S3).
    fn suspend(&self);
    /// The guest ended a test run; `code` is the exit status that it asks for.
    fn debug_exit(&self, code: u32);
    /// The guest says that it has panicked; `crash_kernel`: it starts another kernel to look at
    /// itself. Devices without such a register never call it.
    fn panicked(&self, crash_kernel: bool) {
        let _ = crash_kernel;
    }
}
