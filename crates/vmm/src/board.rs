//! Board version 1: where things are in the guest's address spaces.
//!
//! Guests see these numbers, and saved states depend on them: a change needs a new board version.

/// Version of the guest-visible layout.
pub const BOARD_VERSION: u32 = 1;

/// First address of the 32-bit PCI memory window.
pub const PCI_MMIO32_START: u64 = 0xc000_0000;
/// Last address of the 32-bit PCI memory window.
pub const PCI_MMIO32_LAST: u64 = 0xdfff_ffff;
/// PCI Express configuration space, segment 0, buses 0-255.
pub const ECAM_START: u64 = 0xe000_0000;
/// Size of the configuration space in bytes.
pub const ECAM_BYTES: u64 = 0x1000_0000;
/// First address of the 64-bit PCI memory window.
pub const PCI_MMIO64_START: u64 = 0x80_0000_0000;
/// Size of the 64-bit PCI memory window in bytes.
pub const PCI_MMIO64_BYTES: u64 = 0x80_0000_0000;
/// First port of the PCI I/O window.
pub const PCI_IO_START: u16 = 0xc000;
/// Last port of the PCI I/O window.
pub const PCI_IO_LAST: u16 = 0xffff;

/// IO-APIC registers.
pub const IOAPIC_ADDR: u32 = 0xfec0_0000;
/// Size of the IO-APIC's page in bytes.
pub const IOAPIC_BYTES: u64 = 0x1000;
/// HPET registers.
pub const HPET_ADDR: u32 = 0xfed0_0000;
/// Size of the HPET's registers in bytes.
pub const HPET_BYTES: u32 = 0x400;
/// Local APIC registers.
pub const LAPIC_ADDR: u32 = 0xfee0_0000;

/// Interrupt of ACPI events, level-triggered, active low.
pub const SCI_GSI: u32 = 9;
/// First GSI of PCI INTx.
pub const PCI_INTX_GSI: u32 = 16;
/// Number of GSIs that PCI INTx is spread over.
pub const PCI_INTX_COUNT: u32 = 8;

/// Four-byte PM1a event block.
pub const PM1A_EVT_PORT: u16 = 0x600;
/// Two-byte PM1a control block.
pub const PM1A_CNT_PORT: u16 = 0x604;
/// Four-byte PM timer.
pub const PM_TMR_PORT: u16 = 0x608;
/// Eight-byte general-purpose event block 0.
pub const GPE0_PORT: u16 = 0x620;
/// Reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// Value that resets the machine when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 6;
/// `SLP_TYP` of soft-off.
pub const SLP_TYP_S5: u8 = 5;
/// CMOS index of the century.
pub const CMOS_CENTURY: u8 = 0x32;

/// Most vCPUs of a machine: what the ACPI area has room for, and APIC ids beyond 8 bits are x2APIC.
pub const MAX_VCPUS: u32 = 1024;

/// The GSI of a PCI function's interrupt pin; pin 0 is INTA.
pub const fn intx_gsi(slot: u32, pin: u32) -> u32 {
    PCI_INTX_GSI + (slot + pin) % PCI_INTX_COUNT
}

/// Where boot data goes in the first megabyte.
pub mod low {
    /// BIOS data area.
    pub const BDA: u64 = 0x400;
    /// GDT that the boot protocols ask for.
    pub const GDT: u64 = 0x500;
    /// PVH start info, its memory map and its module list.
    pub const PVH_INFO: u64 = 0x6000;
    /// Linux `boot_params`, the "zero page".
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Top of the stack that entered code may use.
    pub const STACK_TOP: u64 = 0x8ff0;
    /// Page tables for 64-bit entry: PML4, PDPT and four page directories.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// Multiboot information, module list and strings.
    pub const MULTIBOOT_INFO: u64 = 0x1_0000;
    /// Kernel command line.
    pub const CMDLINE: u64 = 0x2_0000;
    /// Room for the command line in bytes, with its NUL.
    pub const CMDLINE_BYTES: u64 = 0x1_0000;
    /// Extended BIOS data area: the last KiB of conventional memory.
    pub const EBDA: u64 = 0x9_fc00;
    /// End of conventional memory.
    pub const CONVENTIONAL_END: u64 = 0xa_0000;
    /// RSDP and ACPI tables.
    pub const ACPI: u64 = 0xe_0000;
    /// Room for them in bytes.
    pub const ACPI_BYTES: u64 = 0x1_0000;
    /// MP floating pointer and configuration table.
    pub const MP_TABLE: u64 = 0xf_0000;
    /// Room for them in bytes.
    pub const MP_TABLE_BYTES: u64 = 0x8000;
    /// SMBIOS entry points and tables.
    pub const SMBIOS: u64 = 0xf_8000;
    /// Room for them in bytes.
    pub const SMBIOS_BYTES: u64 = 0x8000;
    /// First byte above the first megabyte.
    pub const END: u64 = 0x10_0000;
}

/// Where the board for firmware differs (`docs/adr/0007-firmware.md`), version 1 of it.
pub mod firmware {
    /// Name in ACPI tables.
    pub const TABLE_ID: [u8; 8] = *b"BOARDFW1";
    /// First port for PCI.
    pub const PCI_IO_START: u16 = 0x1000;
    /// Where PCI Express configuration space is said to be as long as firmware has not put it
    /// anywhere.
    pub const ECAM_USUAL: u64 = 0xb000_0000;
    /// `SLP_TYP` of soft-off: what SeaBIOS and OVMF write to switch off.
    pub const SLP_TYP_S5: u8 = 0;
    /// Bits of a guest-physical address, if RAM does not need more ([`physical_bits`]). OVMF maps all
    /// that they reach, some builds in pages of 2 MiB: with 46 bits that is 256 MiB of page tables.
    const PHYSICAL_BITS: u8 = 39;

    /// Bits of a guest-physical address with RAM up to `ram_end`, which leave as much for PCI.
    pub const fn physical_bits(ram_end: u64) -> u8 {
        let needed = (2 * ram_end).next_power_of_two().trailing_zeros() as u8;
        if needed > PHYSICAL_BITS {
            needed
        } else {
            PHYSICAL_BITS
        }
    }
}
