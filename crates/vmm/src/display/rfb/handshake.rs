//! The opening of a connection: RFC 6143 §7.1 to §7.3.

use std::io::{self, Read};

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};

use super::wire::{Receiver, Sender, violation};
use super::{PASSWORD_BYTES, pixels::PixelFormat};

const VERSION: &[u8; 12] = b"RFB 003.008\n";
const SECURITY_NONE: u8 = 1;
const SECURITY_VNC: u8 = 2;
/// Time that a wrong password costs.
const PENALTY: std::time::Duration = std::time::Duration::from_secs(1);

/// What the answer to a challenge must be: DES in the old way, whose key has the bits of each
/// byte mirrored. §7.2.2.
pub(super) fn response(password: &[u8; PASSWORD_BYTES], challenge: &[u8; 16]) -> [u8; 16] {
    let key = password.map(u8::reverse_bits);
    let des = Des::new(&key.into());
    let mut out = *challenge;
    for block in out.as_chunks_mut::<8>().0 {
        let mut b = (*block).into();
        des.encrypt_block(&mut b);
        *block = b.into();
    }
    out
}

/// Compares without telling by its time where the difference is.
fn same(a: &[u8; 16], b: &[u8; 16]) -> bool {
    a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

/// Opens a connection up to and with ServerInit.
pub(super) fn open(
    from: &mut Receiver,
    to: &Sender,
    password: Option<&[u8; PASSWORD_BYTES]>,
    name: &str,
    size: (u32, u32),
) -> io::Result<()> {
    to.send(VERSION)?;
    let mut version = [0; 12];
    from.read(&mut version)?;
    // Clients with other 3.x versions are to be taken for 3.3. §7.1.1.
    let minor = match &version {
        b"RFB 003.008\n" => 8,
        b"RFB 003.007\n" => 7,
        v if v.starts_with(b"RFB 00") && v.ends_with(b"\n") => 3,
        _ => return Err(violation("a client that does not speak RFB")),
    };
    let kind = match password {
        Some(_) => SECURITY_VNC,
        None => SECURITY_NONE,
    };
    if minor == 3 {
        to.send(&u32::from(kind).to_be_bytes())?;
    } else {
        to.send(&[1, kind])?;
        let mut chosen = [0];
        from.read(&mut chosen)?;
        if chosen[0] != kind {
            refuse(to, minor, "this security type was not offered")?;
            return Err(violation("a security type that was not offered"));
        }
    }
    if let Some(password) = password {
        let mut challenge = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut challenge)?;
        to.send(&challenge)?;
        let mut answer = [0; 16];
        from.read(&mut answer)?;
        if !same(&answer, &response(password, &challenge)) {
            std::thread::sleep(PENALTY);
            refuse(to, minor, "the password is wrong")?;
            return Err(violation("a wrong password"));
        }
    }
    if password.is_some() || minor == 8 {
        to.send(&0u32.to_be_bytes())?;
    }
    // Whether others may stay: they may.
    from.read(&mut [0])?;
    let mut init = Vec::new();
    init.extend((size.0 as u16).to_be_bytes());
    init.extend((size.1 as u16).to_be_bytes());
    init.extend(PixelFormat::NATIVE.to_bytes());
    init.extend((name.len() as u32).to_be_bytes());
    init.extend(name.as_bytes());
    to.send(&init)
}

/// SecurityResult: failed. §7.1.3.
fn refuse(to: &Sender, minor: u8, why: &str) -> io::Result<()> {
    let mut out = 1u32.to_be_bytes().to_vec();
    if minor == 8 {
        out.extend((why.len() as u32).to_be_bytes());
        out.extend(why.as_bytes());
    }
    to.send(&out)
}
