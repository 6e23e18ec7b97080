//! The frame check sequence of Ethernet, IEEE 802.3 §3.2.9.

/// CRC-32 of the bytes 0 to 255, then of each followed by one to seven zero bytes, so that eight
/// bytes are taken at a time.
static TABLES: [[u32; 256]; 8] = tables();

const POLYNOMIAL: u32 = 0xedb8_8320;

const fn tables() -> [[u32; 256]; 8] {
    let mut t = [[0; 256]; 8];
    let mut n = 0;
    while n < 256 {
        let mut crc = n as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 };
            bit += 1;
        }
        t[0][n] = crc;
        n += 1;
    }
    let mut slice = 1;
    while slice < 8 {
        let mut n = 0;
        while n < 256 {
            let before: u32 = t[slice - 1][n];
            t[slice][n] = (before >> 8) ^ t[0][(before & 0xff) as usize];
            n += 1;
        }
        slice += 1;
    }
    t
}

/// The register after `data`, before the final complement.
fn register(data: &[u8]) -> u32 {
    let mut crc = !0_u32;
    let (words, rest) = data.as_chunks::<8>();
    for w in words {
        let v = u64::from_le_bytes(*w) ^ u64::from(crc);
        crc = v
            .to_le_bytes()
            .iter()
            .zip(TABLES.iter().rev())
            .fold(0, |sum, (b, table)| sum ^ table[usize::from(*b)]);
    }
    for b in rest {
        crc = (crc >> 8) ^ TABLES[0][usize::from(crc as u8 ^ b)];
    }
    crc
}

/// The four bytes that follow a frame on the wire.
pub(super) fn fcs(frame: &[u8]) -> [u8; 4] {
    (!register(frame)).to_le_bytes()
}

/// The upper six bits of the register after an address, the first bit on the wire uppermost: how
/// cards with 64 bits of multicast filter choose one.
pub(super) fn multicast_bit(address: &[u8; 6]) -> u32 {
    register(address).reverse_bits() >> 26
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_value_is_that_of_the_catalogue() {
        // CRC-32/ISO-HDLC of "123456789".
        assert_eq!(fcs(b"123456789"), 0xcbf4_3926_u32.to_le_bytes());
    }

    #[test]
    fn multicast_bits_are_those_of_drivers() {
        // As drivers do it, bit by bit from the other end.
        let by_bits = |a: &[u8; 6]| {
            let mut crc = !0_u32;
            for byte in a {
                for bit in 0..8 {
                    let next = (crc >> 31) ^ u32::from(byte >> bit & 1);
                    crc = (crc << 1) ^ if next != 0 { 0x04c1_1db7 } else { 0 };
                }
            }
            crc >> 26
        };
        for n in 0..=255_u8 {
            let a = [1, 0, 0x5e, n, 7, n.wrapping_mul(3)];
            assert_eq!(multicast_bit(&a), by_bits(&a));
        }
    }

    #[test]
    fn eight_at_a_time_is_the_same_as_one() {
        let data: Vec<u8> = (0..100_u32).map(|n| (n * 7) as u8).collect();
        for len in 0..100 {
            let slow = data[..len].iter().fold(!0_u32, |crc, b| {
                (crc >> 8) ^ TABLES[0][usize::from(crc as u8 ^ b)]
            });
            assert_eq!(register(&data[..len]), slow, "{len}");
        }
    }
}
