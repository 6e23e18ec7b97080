//! SMBIOS tables, for what asks "which machine is this?". DMTF DSP0134 (SMBIOS) 3.6.0.

use pyrite_api::v1::SmbiosSpec;

/// Where the structures begin, after the entry points.
const STRUCTURES_AT: u64 = 0x40;
/// Bytes of the 2.1 entry point, §5.2.1.
const ENTRY_21_BYTES: u8 = 31;
/// Bytes of the 3.0 entry point, §5.2.2.
const ENTRY_30_BYTES: u8 = 24;
const ENTRY_30_AT: usize = 0x20;
const NAME: &str = "Pyrite";

const BIOS: u8 = 0;
const SYSTEM: u8 = 1;
const CHASSIS: u8 = 3;
const PROCESSOR: u8 = 4;
const MEMORY_ARRAY: u8 = 16;
const MEMORY_DEVICE: u8 = 17;
const MEMORY_ARRAY_ADDRESS: u8 = 19;
const BOOT_INFORMATION: u8 = 32;
const END: u8 = 127;

/// "Unknown" of most enumerations.
const UNKNOWN: u8 = 2;
/// "No more handles".
const NO_HANDLE: u16 = 0xfffe;
const CHASSIS_HANDLE: u16 = 0x300;
const PROCESSOR_HANDLE: u16 = 0x400;
const ARRAY_HANDLE: u16 = 0x1000;
const DEVICE_HANDLE: u16 = 0x1100;

/// What the tables say of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM ranges, ascending: start and size in bytes.
    pub ram: &'a [(u64, u64)],
    /// Who the machine says that it is.
    pub identity: &'a SmbiosSpec,
}

/// A list of structures, §6.1.
struct Structures {
    bytes: Vec<u8>,
    count: u16,
    longest: usize,
}

impl Structures {
    /// One structure; `body` is the formatted area after the header, and refers to `strings` by
    /// their numbers from 1 on.
    fn add(&mut self, kind: u8, handle: u16, body: &[u8], strings: &[&str]) {
        let start = self.bytes.len();
        // LIMIT: the formatted areas below are far shorter than 251 bytes.
        self.bytes.extend_from_slice(&[kind, body.len() as u8 + 4]);
        self.bytes.extend_from_slice(&handle.to_le_bytes());
        self.bytes.extend_from_slice(body);
        for s in strings {
            self.bytes.extend_from_slice(s.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.count += 1;
        self.longest = self.longest.max(self.bytes.len() - start);
    }
}

/// BIOS information, §7.1: there is none, but readers look at vendor, version and date.
fn bios(s: &mut Structures) {
    // "BIOS characteristics are not supported"; extension: "the table describes a virtual machine".
    let mut body = vec![1, 2, 0, 0xe8, 3, 0];
    body.extend_from_slice(&(1u64 << 3).to_le_bytes());
    body.extend_from_slice(&[0, 1 << 4, 0, 0, 0xff, 0xff]);
    s.add(BIOS, 0, &body, &[NAME, "board 1", "01/01/2025"]);
}

/// System information, §7.2. Without a word from the user no UUID is set: a machine that is not the
/// same at its next start has no identity.
fn system(s: &mut Structures, id: &SmbiosSpec) {
    const POWER_SWITCH: u8 = 6;
    let mut strings = vec![
        id.vendor.as_deref().unwrap_or(NAME),
        id.product.as_deref().unwrap_or("Pyrite VM"),
        id.version.as_deref().unwrap_or("board 1"),
    ];
    strings.extend(id.serial.as_deref());
    let serial = if id.serial.is_some() { 4 } else { 0 };
    let mut body = vec![1, 2, 3, serial];
    let mut uuid = id.uuid_bytes().unwrap_or_default();
    // The first three fields are little-endian, §7.2.1.
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    body.extend_from_slice(&uuid);
    body.extend_from_slice(&[POWER_SWITCH, 0, 0]);
    s.add(SYSTEM, 0x100, &body, &strings);
}

/// System enclosure, §7.4.
fn chassis(s: &mut Structures) {
    const OTHER: u8 = 1;
    const SAFE: u8 = 3;
    const NO_SECURITY: u8 = 3;
    let mut body = vec![1, OTHER, 0, 0, 0, SAFE, SAFE, SAFE, NO_SECURITY];
    body.extend_from_slice(&[0; 9]); // OEM, height, power cords, no elements
    s.add(CHASSIS, CHASSIS_HANDLE, &body, &[NAME]);
}

/// Processor information, §7.5: one socket with all vCPUs as cores.
fn processor(s: &mut Structures, vcpus: u32) {
    const CENTRAL: u8 = 3;
    const SOCKET_OTHER: u8 = 1;
    const ENABLED: u8 = 0x41;
    const NO_CACHE: [u8; 2] = [0xff, 0xff];
    // FFH: the 16-bit fields have it.
    let (few, cores) = (
        vcpus.min(0xff) as u8,
        (vcpus.min(0xfffe) as u16).to_le_bytes(),
    );
    let mut body = vec![1, CENTRAL, UNKNOWN, 2];
    body.extend_from_slice(&[0; 8]); // CPUID says it better
    body.extend_from_slice(&[0, 0]); // version, voltage
    body.extend_from_slice(&[0; 6]); // clocks: unknown
    body.extend_from_slice(&[ENABLED, SOCKET_OTHER]);
    body.extend_from_slice(&[NO_CACHE; 3].concat());
    body.extend_from_slice(&[0, 0, 0, few, few, few]); // cores, enabled cores, threads
    body.extend_from_slice(&4u16.to_le_bytes()); // 64-bit capable
    body.extend_from_slice(&u16::from(UNKNOWN).to_le_bytes());
    body.extend_from_slice(&[cores; 3].concat());
    s.add(PROCESSOR, PROCESSOR_HANDLE, &body, &["CPU 0", NAME]);
}

/// Physical memory array §7.17, its one device §7.18, and where it is mapped §7.20.
fn memory(s: &mut Structures, ram: &[(u64, u64)]) {
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_CORRECTION: u8 = 3;
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    const OTHER: u16 = 1 << 1;
    let bytes: u64 = ram.iter().map(|(_, size)| size).sum();
    let (kib, mib) = (bytes >> 10, bytes >> 20);
    let mut body = vec![SYSTEM_BOARD, SYSTEM_MEMORY, NO_CORRECTION];
    // 80000000H: the extended field has it.
    let capacity = u32::try_from(kib).ok().filter(|k| *k < 1 << 31);
    body.extend_from_slice(&capacity.unwrap_or(1 << 31).to_le_bytes());
    body.extend_from_slice(&NO_HANDLE.to_le_bytes());
    body.extend_from_slice(&1u16.to_le_bytes());
    let extended = if capacity.is_some() { 0 } else { bytes };
    body.extend_from_slice(&extended.to_le_bytes());
    s.add(MEMORY_ARRAY, ARRAY_HANDLE, &body, &[]);

    let mut body = ARRAY_HANDLE.to_le_bytes().to_vec();
    body.extend_from_slice(&NO_HANDLE.to_le_bytes());
    body.extend_from_slice(&[0xff; 4]); // widths: unknown
    // 7FFFH: the extended field has it.
    let size = u16::try_from(mib).ok().filter(|m| *m < 0x7fff);
    body.extend_from_slice(&size.unwrap_or(0x7fff).to_le_bytes());
    body.extend_from_slice(&[DIMM, 0, 1, 0, RAM]);
    body.extend_from_slice(&OTHER.to_le_bytes());
    body.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0]); // speed … attributes
    let extended = if size.is_some() { 0 } else { mib };
    body.extend_from_slice(&(extended.min(0x7fff_ffff) as u32).to_le_bytes());
    body.extend_from_slice(&[0; 8]); // speed, voltages
    s.add(MEMORY_DEVICE, DEVICE_HANDLE, &body, &["DIMM 0", NAME]);

    for (n, (start, size)) in ram.iter().enumerate() {
        let last = start + size.saturating_sub(1);
        let kib = |a: u64| u32::try_from(a >> 10).ok().filter(|k| *k != u32::MAX);
        let mut body = Vec::new();
        match (kib(*start), kib(last)) {
            (Some(a), Some(b)) => {
                body.extend_from_slice(&[a.to_le_bytes(), b.to_le_bytes()].concat());
                body.extend_from_slice(&ARRAY_HANDLE.to_le_bytes());
                body.push(1);
                body.extend_from_slice(&[0; 16]);
            }
            _ => {
                body.extend_from_slice(&[0xff; 8]);
                body.extend_from_slice(&ARRAY_HANDLE.to_le_bytes());
                body.push(1);
                body.extend_from_slice(&[start.to_le_bytes(), last.to_le_bytes()].concat());
            }
        }
        s.add(MEMORY_ARRAY_ADDRESS, 0x1300 + n as u16, &body, &[]);
    }
}

fn checksum(bytes: &[u8]) -> u8 {
    let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    sum.wrapping_neg()
}

/// Sets the checksum at `at` of an entry point.
fn seal(bytes: &mut [u8], at: usize) {
    let sum = checksum(bytes);
    if let Some(b) = bytes.get_mut(at) {
        *b = sum;
    }
}

/// Entry points and tables, to be put at `base` (16-byte aligned, F0000H-FFFFFH, where they are
/// searched). Both entry points lead to the same structures.
pub fn build(base: u64, facts: &Facts<'_>) -> Vec<u8> {
    let s = structures(facts, true);
    let at = (base + STRUCTURES_AT) as u32;
    let mut old = entry_21(&s, at);

    let mut new = b"_SM3_\0".to_vec();
    new.extend_from_slice(&[ENTRY_30_BYTES, 3, 6, 0, 1, 0]);
    new.extend_from_slice(&(s.bytes.len() as u32).to_le_bytes());
    new.extend_from_slice(&u64::from(at).to_le_bytes());
    seal(&mut new, 5);

    old.resize(ENTRY_30_AT, 0);
    old.extend_from_slice(&new);
    old.resize(STRUCTURES_AT as usize, 0);
    old.extend_from_slice(&s.bytes);
    old
}

/// What firmware makes its tables from: an entry point (2.1) and the structures, to which firmware
/// adds what it says of itself.
pub fn files(facts: &Facts<'_>) -> (Vec<u8>, Vec<u8>) {
    let s = structures(facts, false);
    (entry_21(&s, 0), s.bytes)
}

fn structures(facts: &Facts<'_>, with_bios: bool) -> Structures {
    let mut s = Structures {
        bytes: Vec::new(),
        count: 0,
        longest: 0,
    };
    if with_bios {
        bios(&mut s);
    }
    system(&mut s, facts.identity);
    chassis(&mut s);
    processor(&mut s, facts.vcpus);
    memory(&mut s, facts.ram);
    // No errors detected, §7.33.
    s.add(BOOT_INFORMATION, 0x2000, &[0; 7], &[]);
    s.add(END, 0x7f00, &[], &[]);
    s
}

/// The 2.1 entry point of structures at `at`.
fn entry_21(s: &Structures, at: u32) -> Vec<u8> {
    let mut old = b"_SM_\0".to_vec();
    old.extend_from_slice(&[ENTRY_21_BYTES, 2, 8]);
    old.extend_from_slice(&(s.longest as u16).to_le_bytes());
    old.extend_from_slice(&[0; 6]);
    let mut inner = b"_DMI_\0".to_vec();
    inner.extend_from_slice(&(s.bytes.len() as u16).to_le_bytes());
    inner.extend_from_slice(&at.to_le_bytes());
    inner.extend_from_slice(&s.count.to_le_bytes());
    inner.push(0x28);
    seal(&mut inner, 5);
    old.extend_from_slice(&inner);
    seal(&mut old, 4);
    old
}
