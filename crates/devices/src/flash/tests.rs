use std::sync::{Arc, Mutex};

use super::*;

type Writes = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// Notes every write; refuses while `broken`.
struct Notes(Writes, Arc<Mutex<bool>>);

impl FlashStore for Notes {
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        if *self.1.lock().unwrap() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.lock().unwrap().push((offset, data.to_vec()));
        Ok(())
    }
}

fn flash() -> (Flash, Writes, Arc<Mutex<bool>>) {
    let (writes, broken) = (Writes::default(), Arc::default());
    let store = Notes(Arc::clone(&writes), Arc::clone(&broken));
    let f = Flash::new(vec![0xff; 4 * BLOCK_BYTES], Box::new(store)).unwrap();
    (f, writes, broken)
}

fn read(f: &mut Flash, at: u64) -> u8 {
    let mut b = [0];
    f.mmio_read(at, &mut b);
    b[0]
}

fn put(f: &mut Flash, at: u64, bytes: &[u8]) {
    for b in bytes {
        f.mmio_write(at, &[*b]);
    }
}

#[test]
fn firmware_finds_a_flash() {
    let (mut f, ..) = flash();
    put(&mut f, 0, &[CLEAR_STATUS]);
    assert_eq!(read(&mut f, 0), 0xff, "not RAM");
    put(&mut f, 0, &[READ_STATUS]);
    assert_eq!(read(&mut f, 0), 0, "not ROM");
    put(&mut f, 0, &[READ_CFI]);
    let query: Vec<u8> = (0x10..0x13).map(|n| read(&mut f, n)).collect();
    assert_eq!(query, b"QRY");
    let block = u32::from(read(&mut f, 0x2f)) << 8 | u32::from(read(&mut f, 0x30)) << 16;
    assert_eq!(block as usize, BLOCK_BYTES);
    assert_eq!(read(&mut f, 0x2d), 3, "blocks less one");
    put(&mut f, 0, &[READ_ID]);
    assert_eq!((read(&mut f, 0), read(&mut f, 1)), (0x89, 0x18));
    put(&mut f, 0, &[READ_ARRAY]);
    assert_eq!(read(&mut f, 0), 0xff);
}

#[test]
fn programming_clears_bits_and_erasing_sets_them() {
    let (mut f, ..) = flash();
    put(&mut f, 0x1005, &[PROGRAM, 0x3c]);
    assert_eq!(read(&mut f, 0x1005), READY, "status");
    put(&mut f, 0x1005, &[PROGRAM, 0xf0, READ_ARRAY]);
    assert_eq!(read(&mut f, 0x1005), 0x30);
    put(&mut f, 0x2005, &[PROGRAM, 0, READ_ARRAY]);
    put(&mut f, 0x1ffe, &[ERASE, CONFIRM, READ_ARRAY]);
    assert_eq!(read(&mut f, 0x1005), 0xff);
    assert_eq!(read(&mut f, 0x2005), 0, "another block");
    put(&mut f, 0, &[ERASE, READ_ARRAY]);
    assert_eq!(read(&mut f, 0) & ERASE_ERROR, ERASE_ERROR, "not confirmed");
}

#[test]
fn the_buffer_is_programmed_when_it_is_confirmed() {
    let (mut f, ..) = flash();
    put(&mut f, 0x100, &[WRITE_BUFFER, 2]);
    for n in 0..3 {
        put(&mut f, 0x100 + n, &[n as u8 + 1]);
    }
    put(&mut f, 0x100, &[CONFIRM, READ_ARRAY]);
    let got: Vec<u8> = (0x100..0x104).map(|n| read(&mut f, n)).collect();
    assert_eq!(got, [1, 2, 3, 0xff]);
    put(&mut f, 0x200, &[WRITE_BUFFER, 0, 7, 0]);
    assert_ne!(read(&mut f, 0x200) & PROGRAM_ERROR, 0, "not confirmed");
    put(&mut f, 0x200, &[READ_ARRAY]);
    assert_eq!(read(&mut f, 0x200), 0xff);
}

#[test]
fn one_operation_is_one_write_of_the_file() {
    let (mut f, writes, _) = flash();
    for n in 0..16 {
        put(&mut f, 0x40 + n, &[PROGRAM, n as u8]);
    }
    assert!(writes.lock().unwrap().is_empty());
    put(&mut f, 0x4f, &[READ_ARRAY]);
    assert_eq!(
        *writes.lock().unwrap(),
        [(0x40, (0..16).collect::<Vec<u8>>())]
    );
    put(&mut f, 0x4f, &[READ_ARRAY]);
    assert_eq!(writes.lock().unwrap().len(), 1, "nothing has changed");
}

#[test]
fn a_full_disk_is_told_and_made_up_for() {
    let (mut f, writes, broken) = flash();
    *broken.lock().unwrap() = true;
    put(&mut f, 8, &[PROGRAM, 1, READ_ARRAY, READ_STATUS]);
    assert_ne!(read(&mut f, 8) & PROGRAM_ERROR, 0);
    *broken.lock().unwrap() = false;
    f.pause();
    assert_eq!(*writes.lock().unwrap(), [(8, vec![1])]);
}

#[test]
fn a_saved_chip_brings_its_content_along() {
    let (mut f, ..) = flash();
    put(&mut f, 0x30, &[PROGRAM, 0x55, READ_ARRAY]);
    put(&mut f, 0x31, &[WRITE_BUFFER, 1, 0xaa]);
    let section = f.save().unwrap();
    let (mut g, writes, _) = flash();
    g.restore(&section).unwrap();
    assert_eq!(writes.lock().unwrap().len(), 1);
    put(&mut g, 0x32, &[0xbb, CONFIRM, READ_ARRAY]);
    assert_eq!((read(&mut g, 0x30), read(&mut g, 0x32)), (0x55, 0xbb));
    let mut small = Flash::new(vec![0; BLOCK_BYTES], Box::new(Volatile)).unwrap();
    assert!(small.restore(&section).is_err());
}

#[test]
fn any_bytes_are_survived() {
    let (mut f, ..) = flash();
    let mut x = 0x2545_f491u32;
    for _ in 0..200_000 {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        let at = u64::from(x >> 8) % 0x5000;
        f.mmio_write(at, &x.to_le_bytes()[..1 + (x as usize >> 4) % 3]);
        f.mmio_read(at, &mut [0; 8]);
    }
    assert!(f.regs.buffer.len() <= BUFFER_BYTES);
    let saved = f.save().unwrap();
    f.restore(&saved).unwrap();
}

#[test]
fn sizes_that_cannot_be() {
    for bytes in [0, 1, BLOCK_BYTES + 1, MAX_BYTES + BLOCK_BYTES] {
        assert!(Flash::new(vec![0; bytes], Box::new(Volatile)).is_none());
    }
}
