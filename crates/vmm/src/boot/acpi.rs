//! ACPI tables of all boards. ACPI 6.5.
//!
//! The machine has the legacy devices of a PC and says so; ACPI mode is always on (there is no SMI
//! to switch it). All tables are contiguous so that they can be placed as one piece.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, AddressSpace as Window, AddressSpaceCacheable, Arg, BufferData, CreateDWordField, Device,
    EISAName, Else, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Or, Package,
    PackageBuilder, Path, ResourceTemplate, Return, Scope, Uuid,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use pyrite_devices::storage::floppy::DriveKind;
use pyrite_devices::{fw_cfg, pvpanic};

use crate::board::{
    CMOS_CENTURY, ECAM_BYTES, ECAM_START, GPE0_PORT, HPET_ADDR, HPET_BYTES, IOAPIC_ADDR,
    LAPIC_ADDR, PCI_IO_LAST, PCI_IO_START, PCI_MMIO32_LAST, PCI_MMIO32_START, PCI_MMIO64_BYTES,
    PCI_MMIO64_START, PM_TMR_PORT, PM1A_CNT_PORT, PM1A_EVT_PORT, RESET_PORT, RESET_VALUE, SCI_GSI,
    SLP_TYP_S5, intx_gsi,
};

const OEM_ID: [u8; 6] = *b"PYRITE";
const OEM_REVISION: u32 = 1;
/// Bytes of a table's header, §5.2.6, and where its checksum is.
const HEADER_BYTES: usize = 36;
const CHECKSUM_AT: usize = 9;
/// FIRMWARE_CTRL, DSDT and X_DSDT of the FADT: offset and size. §5.2.9.
const FADT_POINTERS: [(usize, u8); 3] = [(36, 4), (40, 4), (140, 8)];
/// Bytes of an RSDP of revision 2.
const RSDP_BYTES: usize = 36;
/// PCI slots that `_PRT` lists.
const PCI_SLOTS: u32 = 32;
/// First APIC id that only an x2APIC entry can name. §5.2.12.2.
const FIRST_X2APIC_ID: u32 = 255;

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// What the tables say of a board.
#[derive(Clone, Debug)]
pub struct Board {
    /// Name and version, as tables have it.
    pub table_id: [u8; 8],
    /// Where PCI Express configuration space begins; not said without.
    pub ecam: Option<u64>,
    /// First and last addresses of PCI memory below 4 GiB.
    pub windows32: Vec<(u32, u32)>,
    /// First and last address of PCI memory above 4 GiB.
    pub window64: (u64, u64),
    /// First port of PCI.
    pub io_start: u16,
    /// SLP_TYP of soft-off.
    pub off_type: u8,
    /// What not every machine has.
    pub extras: Extras,
}

/// Devices that not every machine of a board has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// Floppy drives.
    pub floppies: Vec<DriveKind>,
    /// There is a pvpanic port.
    pub has_pvpanic: bool,
    /// The guest's kernel, not only its firmware, is to find the firmware configuration device.
    pub has_fw_cfg: bool,
}

impl Board {
    /// Board version 1.
    pub fn version_1() -> Board {
        Board {
            table_id: *b"BOARD 1 ",
            ecam: Some(ECAM_START),
            windows32: vec![(PCI_MMIO32_START as u32, PCI_MMIO32_LAST as u32)],
            window64: (PCI_MMIO64_START, PCI_MMIO64_START + (PCI_MMIO64_BYTES - 1)),
            io_start: PCI_IO_START,
            off_type: SLP_TYP_S5,
            extras: Extras::default(),
        }
    }

    /// A table with a standard header around `body`.
    fn table(&self, signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
        let id = self.table_id;
        let mut sdt = Sdt::new(signature, 36, revision, OEM_ID, id, OEM_REVISION);
        sdt.append_slice(body);
        sdt.as_slice().to_vec()
    }
}

/// Places tables one after another.
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    fn place(&mut self, table: &[u8], align: usize) -> u64 {
        self.bytes
            .resize(self.bytes.len().next_multiple_of(align), 0);
        let at = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        at
    }
}

/// All tables, one after another, and where they refer to each other.
struct Tables {
    bytes: Vec<u8>,
    rsdt: u64,
    xsdt: u64,
    /// Offsets and sizes of addresses in `bytes`.
    pointers: Vec<(usize, u8)>,
    /// Offsets and sizes of the tables with addresses.
    changing: Vec<(usize, usize)>,
}

fn tables(board: &Board, base: u64, header: usize, vcpus: u32) -> Tables {
    let mut area = Area {
        base,
        bytes: vec![0; header],
    };
    let facs = area.place(&bytes_of(&acpi_tables::facs::FACS::new()), 64);
    let dsdt = area.place(&dsdt(board, vcpus), 16);
    let all = [
        Some(fadt(board, facs, dsdt)),
        Some(madt(board, vcpus)),
        Some(hpet(board)),
        board.ecam.map(|at| mcfg(board, at)),
    ];
    let all: Vec<u64> = all.iter().flatten().map(|t| area.place(t, 16)).collect();
    let wide: Vec<u8> = all.iter().flat_map(|a| a.to_le_bytes()).collect();
    let xsdt = area.place(&board.table(*b"XSDT", 1, &wide), 16);
    // Kernels that know only ACPI 1.0 read the RSDT.
    let narrow: Vec<u8> = all.iter().flat_map(|a| (*a as u32).to_le_bytes()).collect();
    let rsdt = area.place(&board.table(*b"RSDT", 1, &narrow), 16);

    let at = |address: u64| (address - base) as usize;
    let mut pointers = Vec::new();
    let fadt_at = all.first().map_or(0, |a| at(*a));
    pointers.extend(FADT_POINTERS.map(|(offset, size)| (fadt_at + offset, size)));
    for n in 0..all.len() {
        pointers.push((at(xsdt) + HEADER_BYTES + 8 * n, 8));
        pointers.push((at(rsdt) + HEADER_BYTES + 4 * n, 4));
    }
    let length = |start: usize| match area.bytes.get(start + 4..start + 8) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]) as usize,
        _ => 0,
    };
    let changing = [fadt_at, at(xsdt), at(rsdt)].map(|t| (t, length(t)));
    Tables {
        rsdt,
        xsdt,
        pointers,
        changing: changing.to_vec(),
        bytes: area.bytes,
    }
}

/// All tables of board version 1 for a machine with `vcpus` vCPUs, to be put at `base` (64-byte
/// aligned, below 4 GiB). The RSDP comes first.
pub fn build(base: u64, vcpus: u32, extras: &Extras) -> Vec<u8> {
    let board = Board {
        extras: extras.clone(),
        ..Board::version_1()
    };
    let mut t = tables(&board, base, 64, vcpus);
    let rsdp = rsdp(t.rsdt as u32, t.xsdt);
    if let Some(slot) = t.bytes.get_mut(..RSDP_BYTES) {
        slot.copy_from_slice(&rsdp);
    }
    t.bytes
}

/// The tables for firmware, which puts them into memory and then follows the script.
pub struct Files {
    /// `etc/acpi/tables`: addresses in it are offsets.
    pub tables: Vec<u8>,
    /// `etc/acpi/rsdp`.
    pub rsdp: Vec<u8>,
    /// `etc/table-loader`.
    pub loader: Vec<u8>,
}

/// The tables as firmware takes them: its interface is what QEMU's documentation says of
/// `BIOSLinkerLoader` (hw/acpi/bios-linker-loader.c), commands of 128 bytes.
pub fn files(board: &Board, vcpus: u32) -> Files {
    const TABLES: &str = "etc/acpi/tables";
    const RSDP: &str = "etc/acpi/rsdp";
    let mut t = tables(board, 0, 0, vcpus);
    let mut rsdp = rsdp(t.rsdt as u32, t.xsdt).to_vec();
    let mut script = Script(Vec::new());
    script.allocate(TABLES, 64, Zone::High);
    script.allocate(RSDP, 16, Zone::FSegment);
    for (offset, size) in &t.pointers {
        script.add_pointer(TABLES, TABLES, *offset, *size);
    }
    for (start, length) in &t.changing {
        // What is there already would be counted.
        if let Some(b) = t.bytes.get_mut(start + CHECKSUM_AT) {
            *b = 0;
        }
        script.add_checksum(TABLES, start + CHECKSUM_AT, *start, *length);
    }
    script.add_pointer(RSDP, TABLES, 16, 4);
    script.add_pointer(RSDP, TABLES, 24, 8);
    for (offset, length) in [(8, 20), (32, RSDP_BYTES)] {
        if let Some(b) = rsdp.get_mut(offset) {
            *b = 0;
        }
        script.add_checksum(RSDP, offset, 0, length);
    }
    Files {
        tables: t.bytes,
        rsdp,
        loader: script.0,
    }
}

/// Where firmware puts a file.
#[derive(Clone, Copy)]
enum Zone {
    High = 1,
    FSegment = 2,
}

/// A script for firmware.
struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, kind: u32, parts: &[&[u8]]) {
        const COMMAND_BYTES: usize = 128;
        let mut c = kind.to_le_bytes().to_vec();
        parts.iter().for_each(|p| c.extend_from_slice(p));
        c.resize(COMMAND_BYTES, 0);
        self.0.extend_from_slice(&c);
    }
    fn name(file: &str) -> [u8; 56] {
        let mut name = [0; 56];
        name.iter_mut().zip(file.bytes()).for_each(|(n, b)| *n = b);
        name
    }
    fn allocate(&mut self, file: &str, align: u32, zone: Zone) {
        self.command(
            1,
            &[&Script::name(file), &align.to_le_bytes(), &[zone as u8]],
        );
    }
    fn add_pointer(&mut self, file: &str, to: &str, offset: usize, size: u8) {
        let (file, to) = (Script::name(file), Script::name(to));
        self.command(2, &[&file, &to, &(offset as u32).to_le_bytes(), &[size]]);
    }
    fn add_checksum(&mut self, file: &str, offset: usize, start: usize, length: usize) {
        let n = [offset, start, length].map(|n| (n as u32).to_le_bytes());
        self.command(3, &[&Script::name(file), &n.concat()]);
    }
}

/// Root system description pointer, §5.2.5.3.
fn rsdp(rsdt: u32, xsdt: u64) -> [u8; RSDP_BYTES] {
    let sum = |b: &[u8]| b.iter().fold(0u8, |s, x| s.wrapping_add(*x)).wrapping_neg();
    let mut r = [0; RSDP_BYTES];
    r[..8].copy_from_slice(b"RSD PTR ");
    r[9..15].copy_from_slice(&OEM_ID);
    r[15] = 2;
    r[16..20].copy_from_slice(&rsdt.to_le_bytes());
    r[20] = RSDP_BYTES as u8;
    r[24..32].copy_from_slice(&xsdt.to_le_bytes());
    r[8] = sum(&r[..20]);
    r[32] = sum(&r);
    r
}

/// Fixed ACPI description table, §5.2.9.
fn fadt(board: &Board, facs: u64, dsdt: u64) -> Vec<u8> {
    /// LEGACY_DEVICES, 8042, VGA Not Present. §5.2.9.3.
    const IAPC_BOOT_ARCH: u16 = 1 << 0 | 1 << 1 | 1 << 2;
    let io = |port: u16, bits: u8, access: AccessSize| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port))
    };
    let mut f = FADTBuilder::new(OEM_ID, board.table_id, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // "No sleep button as a fixed feature"; the power button is one (its flag is clear).
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    f.firmware_ctrl = (facs as u32).into();
    f.dsdt = (dsdt as u32).into();
    f.x_dsdt = dsdt.into();
    f.sci_int = (SCI_GSI as u16).into();
    f.pm1a_evt_blk = u32::from(PM1A_EVT_PORT).into();
    f.pm1a_cnt_blk = u32::from(PM1A_CNT_PORT).into();
    f.pm_tmr_blk = u32::from(PM_TMR_PORT).into();
    f.gpe0_blk = u32::from(GPE0_PORT).into();
    f.pm1_evt_len = 4;
    f.pm1_cnt_len = 2;
    f.pm_tmr_len = 4;
    f.gpe0_blk_len = 8;
    // Latencies above these limits mean that C2 and C3 do not exist.
    f.p_lvl2_lat = 101.into();
    f.p_lvl3_lat = 1001.into();
    f.century = CMOS_CENTURY;
    f.iapc_boot_arch = IAPC_BOOT_ARCH.into();
    f.reset_reg = io(RESET_PORT, 8, AccessSize::ByteAccess);
    f.reset_value = RESET_VALUE;
    f.x_pm1a_evt_blk = io(PM1A_EVT_PORT, 32, AccessSize::WordAccess);
    f.x_pm1a_cnt_blk = io(PM1A_CNT_PORT, 16, AccessSize::WordAccess);
    f.x_pm_tmr_blk = io(PM_TMR_PORT, 32, AccessSize::DwordAccess);
    f.x_gpe0_blk = io(GPE0_PORT, 64, AccessSize::ByteAccess);
    bytes_of(&f.finalize())
}

/// Multiple APIC description table, §5.2.12.
fn madt(board: &Board, vcpus: u32) -> Vec<u8> {
    /// PCAT_COMPAT: there are 8259s.
    const PCAT_COMPAT: u32 = 1;
    const ENABLED: u32 = 1;
    let mut b = Vec::new();
    b.extend_from_slice(&LAPIC_ADDR.to_le_bytes());
    b.extend_from_slice(&PCAT_COMPAT.to_le_bytes());
    for id in 0..vcpus {
        if id < FIRST_X2APIC_ID {
            b.extend_from_slice(&[0, 8, id as u8, id as u8]);
            b.extend_from_slice(&ENABLED.to_le_bytes());
        } else {
            // Processor local x2APIC, §5.2.12.12.
            b.extend_from_slice(&[9, 16, 0, 0]);
            b.extend_from_slice(&id.to_le_bytes());
            b.extend_from_slice(&ENABLED.to_le_bytes());
            b.extend_from_slice(&id.to_le_bytes());
        }
    }
    // I/O APIC, §5.2.12.3. Its id follows the processors'.
    b.extend_from_slice(&[1, 12, vcpus.min(254) as u8, 0]);
    b.extend_from_slice(&IOAPIC_ADDR.to_le_bytes());
    b.extend_from_slice(&0u32.to_le_bytes());
    // Interrupt source overrides, §5.2.12.5: the PIT is on pin 2, the SCI is level, active low.
    b.extend_from_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    b.extend_from_slice(&[2, 10, 0, 9, SCI_GSI as u8, 0, 0, 0, 0x0f, 0]);
    // NMI on LINT1 of all processors, §5.2.12.7 and §5.2.12.13.
    b.extend_from_slice(&[4, 6, 0xff, 0, 0, 1]);
    if vcpus > FIRST_X2APIC_ID {
        b.extend_from_slice(&[0x0a, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    board.table(*b"APIC", 5, &b)
}

/// HPET description table. IA-PC HPET Specification 1.0a §3.2.4.
fn hpet(board: &Board) -> Vec<u8> {
    /// Intel, 64-bit counter, 3 comparators, legacy replacement, revision 1.
    const EVENT_TIMER_BLOCK_ID: u32 = 0x8086_a201;
    let mut b = Vec::new();
    b.extend_from_slice(&EVENT_TIMER_BLOCK_ID.to_le_bytes());
    b.extend_from_slice(&[0, 64, 0, 0]); // memory space, 64 bits
    b.extend_from_slice(&u64::from(HPET_ADDR).to_le_bytes());
    b.push(0); // HPET number
    b.extend_from_slice(&100u16.to_le_bytes()); // shortest periodic interval in ticks
    b.push(0);
    board.table(*b"HPET", 1, &b)
}

/// PCI Express memory-mapped configuration space. PCI Firmware Specification 3.3 §4.1.2.
fn mcfg(board: &Board, ecam: u64) -> Vec<u8> {
    let mut m = MCFG::new(OEM_ID, board.table_id, OEM_REVISION);
    // One MiB per bus.
    m.add_ecam(ecam, 0, 0, ((ECAM_BYTES >> 20) - 1) as u8);
    bytes_of(&m)
}

/// An ISA device: `_HID`, `_UID` and `_CRS`.
fn isa_device(name: &str, hid: &str, uid: u8, ports: &[(u16, u8)], irq: Option<u32>) -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new(hid));
    let uid = Name::new("_UID".into(), &uid);
    let sta = Name::new("_STA".into(), &0x0fu8);
    let ports: Vec<IO> = ports.iter().map(|(p, n)| IO::new(*p, *p, 1, *n)).collect();
    // ISA interrupts: edge, active high, exclusive.
    let irq = irq.map(|n| Interrupt::new(true, true, false, false, n));
    let mut resources: Vec<&dyn Aml> = ports.iter().map(|p| p as &dyn Aml).collect();
    resources.extend(irq.as_ref().map(|i| i as &dyn Aml));
    bytes_of(&Device::new(
        Path::new(name),
        vec![&hid, &uid, &sta, &Raw(crs(resources))],
    ))
}

/// Floppy controller: its ports, its DMA channel, and drives with their geometry. ACPI 6.5 §9.9.
fn floppy_controller(drives: &[DriveKind]) -> Vec<u8> {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0700"));
    let sta = Name::new("_STA".into(), &0x0fu8);
    let ports = [IO::new(0x3f0, 0x3f0, 1, 6), IO::new(0x3f7, 0x3f7, 1, 1)];
    let irq = Interrupt::new(true, true, false, false, 6);
    // DMA descriptor, §6.4.2.2: channel 2, 8 bits, no bus master.
    let dma = Raw(vec![0x2a, 1 << 2, 0]);
    let crs = Raw(crs(vec![&ports[0], &ports[1], &irq, &dma]));
    // _FDE: drives 0 to 3, and that there is no tape.
    let present = (0..4).flat_map(|n| u32::from(n < drives.len()).to_le_bytes());
    let present: Vec<u8> = present.chain(2u32.to_le_bytes()).collect();
    let fde = Name::new("_FDE".into(), &BufferData::new(present));
    let drives = drives.iter().enumerate().map(|(n, kind)| {
        let g = kind.own_format();
        let adr = Name::new("_ADR".into(), &(n as u8));
        // §9.9.2; the last eleven are the diskette parameter table of a BIOS.
        let numbers = [
            n as u8,
            kind.bios_type(),
            g.cylinders - 1,
            g.sectors,
            1,
            0xaf,
            0x02,
            0x25,
            0x02,
            g.sectors,
            0x1b,
            0xff,
            0x6c,
            0xf6,
            0x0f,
            0x08,
        ];
        let mut list = PackageBuilder::new();
        for v in &numbers {
            list.add_element(v);
        }
        let fdi = Name::new("_FDI".into(), &list);
        let name = ["FLPA", "FLPB"].get(n).copied().unwrap_or("FLPC");
        Raw(bytes_of(&Device::new(Path::new(name), vec![&adr, &fdi])))
    });
    let drives: Vec<Raw> = drives.collect();
    let mut parts: Vec<&dyn Aml> = vec![&hid, &sta, &crs, &fde];
    parts.extend(drives.iter().map(|d| d as &dyn Aml));
    bytes_of(&Device::new("FDC0".into(), parts))
}

/// The host bridge without its children.
fn pci_root(board: &Board) -> Vec<Vec<u8>> {
    let mut parts = vec![
        bytes_of(&Name::new("_HID".into(), &EISAName::new("PNP0A08"))),
        bytes_of(&Name::new("_CID".into(), &EISAName::new("PNP0A03"))),
        bytes_of(&Name::new("_UID".into(), &aml::ZERO)),
        bytes_of(&Name::new("_SEG".into(), &aml::ZERO)),
        bytes_of(&Name::new("_BBN".into(), &aml::ZERO)),
        bytes_of(&Name::new("_CCA".into(), &aml::ONE)),
    ];
    let below = board.windows32.iter().map(|(first, last)| {
        Window::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            *first,
            *last,
            None,
        )
    });
    let below: Vec<Window<u32>> = below.collect();
    let (first, last) = board.window64;
    let above = Window::new_memory(AddressSpaceCacheable::Cacheable, true, first, last, None);
    let buses = Window::new_bus_number(0u16, 255u16);
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    // The legacy window lets the guest see ISA devices as children of the bus.
    let legacy = Window::new_io(0u16, 0xcf7u16, None);
    let ports = Window::new_io(board.io_start, PCI_IO_LAST, None);
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config, &legacy, &ports];
    resources.extend(below.iter().map(|w| w as &dyn Aml));
    resources.push(&above);
    parts.push(crs(resources));
    let mut prt = PackageBuilder::new();
    for slot in 0..PCI_SLOTS {
        for pin in 0..4u32 {
            let address: u32 = slot << 16 | 0xffff;
            let gsi = intx_gsi(slot, pin);
            prt.add_element(&Package::new(vec![
                &address,
                &(pin as u8),
                &aml::ZERO,
                &gsi,
            ]));
        }
    }
    parts.push(bytes_of(&Name::new("_PRT".into(), &prt)));
    parts.push(osc());
    parts
}

/// `_CRS` of these resources.
fn crs(resources: Vec<&dyn Aml>) -> Vec<u8> {
    bytes_of(&Name::new("_CRS".into(), &ResourceTemplate::new(resources)))
}

/// `_OSC` of a PCI host bridge (PCI Firmware Specification 3.3 §4.5): the operating system may
/// control everything natively, since no firmware does.
fn osc() -> Vec<u8> {
    let uuid = Uuid::new("33db4d5b-1ff7-401c-9657-7441c03dd766");
    let unknown_uuid = 4u8;
    let field = Path::new("CDW1");
    bytes_of(&Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &If::new(&Equal::new(&Arg(0), &uuid), vec![&Return::new(&Arg(3))]),
            &Else::new(vec![
                &CreateDWordField::new(&field, &Arg(3), &aml::ZERO),
                &Or::new(&field, &field, &unknown_uuid),
                &Return::new(&Arg(3)),
            ]),
        ],
    ))
}

/// Ports and memory that belong to the board: nothing else may be placed there. What the MADT and
/// the host bridge (which includes the reset register) name is not repeated.
fn motherboard(board: &Board) -> Vec<u8> {
    let ecam = board
        .ecam
        .map(|at| Memory32Fixed::new(true, at as u32, ECAM_BYTES as u32));
    let mut resources: Vec<&dyn Aml> = ecam.iter().map(|e| e as &dyn Aml).collect();
    let ports = [
        IO::new(0x20, 0x20, 1, 2),
        IO::new(0xa0, 0xa0, 1, 2),
        IO::new(0x40, 0x40, 1, 4),
        IO::new(0x61, 0x61, 1, 1),
        IO::new(0x92, 0x92, 1, 1),
        IO::new(0x4d0, 0x4d0, 1, 2),
        IO::new(0x510, 0x510, 1, 12),
        IO::new(PM1A_EVT_PORT, PM1A_EVT_PORT, 1, 0x40),
    ];
    resources.extend(ports.iter().map(|p| p as &dyn Aml));
    let resources = crs(resources);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let uid = Name::new("_UID".into(), &aml::ONE);
    bytes_of(&Device::new(
        "MBRD".into(),
        vec![&hid, &uid, &Raw(resources)],
    ))
}

/// Bytes that are AML already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// Differentiated system description table: the devices that cannot be discovered.
fn dsdt(board: &Board, vcpus: u32) -> Vec<u8> {
    let hpet_crs = crs(vec![&Memory32Fixed::new(false, HPET_ADDR, HPET_BYTES)]);
    let hpet = bytes_of(&Device::new(
        "HPET".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0103")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Raw(hpet_crs),
        ],
    ));
    let mut pci: Vec<Raw> = pci_root(board).into_iter().map(Raw).collect();
    pci.extend(
        [
            isa_device("RTC_", "PNP0B00", 0, &[(0x70, 2)], Some(8)),
            isa_device("KBD_", "PNP0303", 0, &[(0x60, 1), (0x64, 1)], Some(1)),
            isa_device("MOU_", "PNP0F13", 0, &[], Some(12)),
            isa_device("COM1", "PNP0501", 1, &[(0x3f8, 8)], Some(4)),
            isa_device("COM2", "PNP0501", 2, &[(0x2f8, 8)], Some(3)),
        ]
        .map(Raw),
    );
    let extras = &board.extras;
    if !extras.floppies.is_empty() {
        pci.push(Raw(floppy_controller(&extras.floppies)));
    }
    if extras.has_pvpanic {
        pci.push(Raw(port_device("PEVT", "QEMU0001", pvpanic::PORT, 1)));
    }
    if extras.has_fw_cfg {
        pci.push(Raw(port_device("FWCF", "QEMU0002", fw_cfg::SELECTOR, 12)));
    }
    let pci_device = Device::new("PCI0".into(), pci.iter().map(|p| p as &dyn Aml).collect());

    let cpus: Vec<Raw> = (0..vcpus).map(|n| Raw(cpu_device(n))).collect();
    let mut root: Vec<&dyn Aml> = vec![&pci_device];
    let (mbrd, hpet) = (Raw(motherboard(board)), Raw(hpet));
    root.extend([&mbrd as &dyn Aml, &hpet]);
    root.extend(cpus.iter().map(|c| c as &dyn Aml));
    let mut body = bytes_of(&Scope::new("\\_SB_".into(), root));
    let s5 = Package::new(vec![
        &board.off_type,
        &board.off_type,
        &aml::ZERO,
        &aml::ZERO,
    ]);
    body.extend(bytes_of(&Name::new("\\_S5_".into(), &s5)));
    board.table(*b"DSDT", 2, &body)
}

/// A device that drivers find by a name of QEMU's documentation, with its ports. It is there, and not
/// shown to users (§6.3.7).
fn port_device(name: &str, id: &'static str, port: u16, count: u8) -> Vec<u8> {
    let ports = IO::new(port, port, 1, count);
    let resources = crs(vec![&ports]);
    bytes_of(&Device::new(
        Path::new(name),
        vec![
            &Name::new("_HID".into(), &id),
            &Name::new("_STA".into(), &0x0bu8),
            &Raw(resources),
        ],
    ))
}

/// A processor device, §8.4. `_UID` matches the MADT.
fn cpu_device(index: u32) -> Vec<u8> {
    bytes_of(&Device::new(
        Path::new(&format!("C{index:03X}")),
        vec![
            &Name::new("_HID".into(), &"ACPI0007"),
            &Name::new("_UID".into(), &index),
            &Name::new("_STA".into(), &0x0fu8),
        ],
    ))
}
