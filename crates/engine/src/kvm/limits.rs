//! What KVM is known not to do as the manuals say: the skip table of the conformance suite.

/// Any KVM.
const ALWAYS: &[(&str, &str)] = &[(
    "apic/x2apic-eoi",
    "KVM accepts a non-zero EOI in x2APIC mode",
)];

/// With AMD's nested paging.
const AMD: &[(&str, &str)] = &[(
    "paging/pae-pdpte",
    "AMD's nested paging reads PDPTEs from memory on each walk (AMD APM Vol. 2 §15.25.10)",
)];

/// A KVM without hardware behind it (`probe` says so): a shadow-paging KVM that interprets ring 0
/// with KVM's small instruction emulator and runs ring 3 natively.
const EMULATED: &[(&str, &str)] = &[
    ("real/bcd", "the emulator lacks DAA"),
    (
        "real/virtual-8086",
        "the emulator lacks IRET in protected mode",
    ),
    (
        "paging/32-bit",
        "no 32-bit paging: triple fault at the first access",
    ),
    (
        "paging/pae",
        "no PAE paging: triple fault at the first access",
    ),
    (
        "paging/pae-pdpte",
        "no PAE paging: triple fault at the first access",
    ),
    ("paging/1-gib-page", "no 1 GiB pages without nested paging"),
    ("paging/smep-smap", "the emulator lacks STAC and CLAC"),
    ("paging/pcid", "CR4.PCIDE is refused"),
    ("segments/limits", "the emulator lacks LSL"),
    ("segments/bound-into-align", "the emulator lacks BOUND"),
    (
        "segments/call-gate",
        "the emulator lacks IRET in protected mode",
    ),
    (
        "segments/task-switch",
        "the emulator lacks a far CALL to a TSS",
    ),
    (
        "segments/task-switch-16",
        "the emulator lacks a far CALL to a TSS",
    ),
    (
        "segments/io-permission",
        "the emulator lacks IRET in protected mode",
    ),
    (
        "segments/sysenter",
        "the emulator lacks IRET in protected mode",
    ),
    (
        "system/exceptions",
        "the emulator lacks INT3 outside real mode",
    ),
    (
        "system/double-fault",
        "the emulator lacks INT n outside real mode",
    ),
    (
        "system/triple-fault",
        "the emulator lacks INT3 outside real mode",
    ),
    (
        "system/syscall-sysret",
        "ring 0 shows the selectors of ring 3 after SYSCALL; no IOPL",
    ),
    ("system/rings", "no INT n from compatibility mode"),
    (
        "system/msrs",
        "a reserved memory type in IA32_PAT is accepted",
    ),
    (
        "system/fsgsbase",
        "runs RDFSBASE natively whatever CR4.FSGSBASE says",
    ),
    ("system/rdtscp-rdpid", "TSC_AUX is refused"),
    ("system/xsave", "the emulator lacks XGETBV"),
    ("system/cmpxchg16b", "the emulator lacks CMPXCHG16B"),
    ("system/device-not-available", "the emulator lacks FNOP"),
    ("system/debug", "the emulator lacks INT1"),
    (
        "apic/level-eoi",
        "the EOI exit comes at delivery, before the guest writes EOI",
    ),
    (
        "apic/interrupt-shadows",
        "interrupts wait until the emulator leaves its loop",
    ),
];

/// The guests that this machine's KVM is known to fail, with reasons. `emulated`: the probe found
/// that no hardware is behind it.
pub fn known_limits(emulated: bool) -> Vec<(&'static str, &'static str)> {
    let vendor = std::arch::x86_64::__cpuid(0);
    let amd = vendor.ebx == u32::from_le_bytes(*b"Auth");
    let mut all = ALWAYS.to_vec();
    if emulated {
        all.extend(EMULATED);
    } else if amd {
        all.extend(AMD);
    }
    all
}
