//! Tiny guests: 32-bit code behind a PVH entry, assembled by hand.

/// Physical address of the code.
const BASE: u32 = 0x10_0000;

/// An ELF kernel whose PVH entry is `code`.
pub fn pvh(code: &[u8]) -> Vec<u8> {
    let mut k = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| k[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x01\x01\x01");
    put(16, &[2, 0, 3, 0, 1]);
    put(24, &BASE.to_le_bytes());
    put(28, &52u32.to_le_bytes());
    put(40, &[52, 0, 32, 0, 2, 0]);
    let size = code.len() as u32;
    let headers = [
        [1, 0x1000, BASE, BASE, size, size, 5, 4096],
        [4, 0x200, 0, 0, 20, 20, 4, 4],
    ];
    for (n, header) in headers.iter().enumerate() {
        for (i, word) in header.iter().enumerate() {
            put(52 + n * 32 + i * 4, &u32::to_le_bytes(*word));
        }
    }
    // Note: name "Xen", type 18 (PHYS32_ENTRY), the entry.
    for (i, word) in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), BASE]
        .iter()
        .enumerate()
    {
        put(0x200 + i * 4, &word.to_le_bytes());
    }
    k.extend_from_slice(code);
    k
}

/// `mov dx, port; mov eax, value; out dx, ax`.
pub fn out16(port: u16, value: u16) -> Vec<u8> {
    let [p0, p1] = port.to_le_bytes();
    let [v0, v1] = value.to_le_bytes();
    vec![0x66, 0xba, p0, p1, 0xb8, v0, v1, 0, 0, 0x66, 0xef]
}

/// `mov dx, port; mov al, value; out dx, al`.
pub fn out8(port: u16, value: u8) -> Vec<u8> {
    let [p0, p1] = port.to_le_bytes();
    vec![0x66, 0xba, p0, p1, 0xb0, value, 0xee]
}

/// Prints on the first serial port.
pub fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|b| out8(0x3f8, b)).collect()
}

/// `cli; hlt; jmp` — for ever.
pub const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfc];

/// `jmp $` — for ever.
pub const SPIN: [u8; 2] = [0xeb, 0xfe];

/// ACPI S5: SLP_TYP 5 and SLP_EN in PM1a_CNT.
pub fn power_off() -> Vec<u8> {
    [&out16(0x604, 5 << 10 | 1 << 13)[..], &HALT].concat()
}

/// Sends every byte that comes on the serial port back, for ever.
pub const ECHO: [u8; 20] = [
    0x66, 0xba, 0xfd, 0x03, // mov dx, LSR
    0xec, // in al, dx
    0xa8, 0x01, // test al, DR
    0x74, 0xf7, // jz to the start
    0x66, 0xba, 0xf8, 0x03, // mov dx, RBR
    0xec, // in al, dx
    0xee, // out dx, al
    0xeb, 0xef, // jmp to the start
    0x90, 0x90, 0x90,
];
