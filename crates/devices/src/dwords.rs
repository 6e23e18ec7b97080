//! Registers of 32 bits behind loads and stores of any size.

/// Serves a load of any size from 32-bit registers.
pub(crate) fn read_dwords(offset: u64, data: &mut [u8], read: impl Fn(u64) -> u32) {
    let mut now = None;
    for (at, b) in (offset..).zip(data) {
        let place = at & !3;
        let value = match now {
            Some((p, v)) if p == place => v,
            _ => read(place),
        };
        now = Some((place, value));
        *b = value.to_le_bytes()[(at & 3) as usize];
    }
}

/// Splits a store of any size into 32-bit registers: offset, value, and the bits that are written.
pub(crate) fn write_dwords(offset: u64, data: &[u8], mut write: impl FnMut(u64, u32, u32)) {
    let mut at = offset;
    let mut rest = data;
    while !rest.is_empty() {
        let n = rest.len().min(4 - (at & 3) as usize);
        let (mut value, mut mask) = (0, 0);
        for (place, b) in (at & 3..).zip(&rest[..n]) {
            value |= u32::from(*b) << (8 * place);
            mask |= 0xff << (8 * place);
        }
        write(at & !3, value, mask);
        at += n as u64;
        rest = &rest[n..];
    }
}
