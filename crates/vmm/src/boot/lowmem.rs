//! What firmware leaves in the first megabyte: BIOS data area, EBDA, ACPI, MP and SMBIOS tables.

use pyrite_api::v1::SmbiosSpec;
use pyrite_mem::GuestMemory;

use super::{BootError, BootInput, acpi, mptable, smbios, write};
use crate::board::low;

/// Smallest memory that direct boot can work with.
const MIN_MEMORY_BYTES: u64 = 4 << 20;

/// Writes all tables; returns the address of the RSDP.
pub(super) fn write_tables(
    memory: &GuestMemory,
    vcpus: u32,
    identity: &SmbiosSpec,
    extras: &acpi::Extras,
) -> Result<u64, BootError> {
    if memory.size_bytes() < MIN_MEMORY_BYTES {
        return Err(BootError::new(
            BootInput::Memory,
            "a guest needs at least 4 MiB of memory",
        ));
    }
    write_bda(memory)?;
    let tables = acpi::build(low::ACPI, vcpus, extras);
    if tables.len() as u64 > low::ACPI_BYTES {
        return Err(BootError::new(
            BootInput::Memory,
            "too many vCPUs for the ACPI area",
        ));
    }
    write(memory, low::ACPI, &tables, BootInput::Memory)?;
    let mp = mptable::build(low::MP_TABLE, vcpus);
    write(memory, low::MP_TABLE, &mp, BootInput::Memory)?;
    let low_end = super::low_ram_end(memory);
    let high = (pyrite_mem::HIGH_RAM_START, memory.size_bytes() - low_end);
    let mut ram = vec![(0, low_end)];
    ram.extend((high.1 > 0).then_some(high));
    let facts = smbios::Facts {
        vcpus,
        ram: &ram,
        identity,
    };
    let smbios = smbios::build(low::SMBIOS, &facts);
    write(memory, low::SMBIOS, &smbios, BootInput::Memory)?;
    Ok(low::ACPI)
}

/// The fields of the BIOS data area that operating systems read without calling the BIOS.
fn write_bda(memory: &GuestMemory) -> Result<(), BootError> {
    let put = |offset: u64, value: u16| {
        write(
            memory,
            low::BDA + offset,
            &value.to_le_bytes(),
            BootInput::Memory,
        )
    };
    put(0x00, 0x3f8)?; // COM1
    put(0x02, 0x2f8)?; // COM2
    put(0x0e, (low::EBDA >> 4) as u16)?; // EBDA segment
    put(0x13, (low::EBDA >> 10) as u16)?; // KiB of conventional memory
    // First byte of the EBDA: its size in KiB.
    write(memory, low::EBDA, &[1], BootInput::Memory)
}
