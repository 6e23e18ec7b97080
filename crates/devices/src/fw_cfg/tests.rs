use super::*;

fn rig() -> (FwCfg, Arc<GuestMemory>) {
    let memory = Arc::new(GuestMemory::new(2 << 20).unwrap());
    let mut f = FwCfg::new(memory.clone());
    f.add_file("etc/table", *b"hello").unwrap();
    f.add_writable_file("etc/vars", [0u8; 8]).unwrap();
    (f, memory)
}

fn read(f: &mut FwCfg, n: usize) -> Vec<u8> {
    (0..n)
        .map(|_| {
            let mut b = [0xff];
            f.pio_read(DATA, &mut b);
            b[0]
        })
        .collect()
}

fn dma(f: &mut FwCfg, m: &GuestMemory, control: u32, length: u32, address: u64) -> u32 {
    let mut access = control.to_be_bytes().to_vec();
    access.extend(length.to_be_bytes());
    access.extend(address.to_be_bytes());
    m.write(0x1000, &access).unwrap();
    f.pio_write(DMA, &0u32.to_be_bytes());
    f.pio_write(DMA + 4, &0x1000u32.to_be_bytes());
    let mut outcome = [0; 4];
    m.read(0x1000, &mut outcome).unwrap();
    u32::from_be_bytes(outcome)
}

#[test]
fn signature_directory_and_file_by_port() {
    let (mut f, _) = rig();
    f.pio_write(SELECTOR, &[0, 0]);
    assert_eq!(read(&mut f, 6), *b"QEMU\0\0");
    f.pio_write(SELECTOR, &FILE_DIR.to_le_bytes());
    let dir = read(&mut f, 4 + 2 * 64);
    assert_eq!(dir[..4], [0, 0, 0, 2]);
    assert_eq!(dir[4..12], [0, 0, 0, 5, 0, 0x20, 0, 0]);
    assert_eq!(&dir[12..22], b"etc/table\0");
    f.pio_write(SELECTOR, &[0x20, 0]);
    assert_eq!(read(&mut f, 7), *b"hello\0\0");
    f.pio_write(SELECTOR, &[0xff, 0x7f]);
    assert_eq!(read(&mut f, 2), [0, 0]);
    assert!(f.add_file("etc/table", []).is_err());
    assert!(f.add_file(&"x".repeat(56), []).is_err());
}

#[test]
fn dma_reads_skips_and_writes_only_writable_files() {
    let (mut f, m) = rig();
    let mut b = [0; 8];
    f.pio_read(DMA, &mut b);
    assert_eq!(&b, b"QEMU CFG");
    m.write(0x2000, &[0xff; 8]).unwrap();
    assert_eq!(dma(&mut f, &m, 0x20 << 16 | DMA_SELECT | DMA_SKIP, 1, 0), 0);
    assert_eq!(dma(&mut f, &m, DMA_READ, 8, 0x2000), 0);
    m.read(0x2000, &mut b).unwrap();
    assert_eq!(&b, b"ello\0\0\0\0");
    assert_eq!(
        dma(&mut f, &m, 0x20 << 16 | DMA_SELECT | DMA_WRITE, 2, 0x2000),
        DMA_ERROR
    );
    assert_eq!(
        dma(&mut f, &m, 0x21 << 16 | DMA_SELECT | DMA_WRITE, 2, 0x2000),
        0
    );
    assert_eq!(f.file("etc/vars").unwrap()[..3], *b"el\0");
    assert_eq!(
        dma(&mut f, &m, DMA_WRITE, 7, 0x2000),
        DMA_ERROR,
        "beyond its size"
    );
    let saved = f.save().unwrap();
    let (mut o, _) = rig();
    o.restore(&saved).unwrap();
    assert_eq!(o.file("etc/vars"), f.file("etc/vars"));
    o.reset();
    assert_eq!(o.file("etc/vars").unwrap(), [0; 8]);
}

#[test]
fn hostile_dma_is_refused() {
    let (mut f, m) = rig();
    for (length, address) in [(u32::MAX, 0u64), (16, u64::MAX - 3), (16, (2 << 20) - 8)] {
        assert_eq!(dma(&mut f, &m, DMA_READ, length, address), DMA_ERROR);
    }
    f.pio_write(DMA, &u32::MAX.to_be_bytes());
    f.pio_write(DMA + 4, &u32::MAX.to_be_bytes());
    for _ in 0..3 {
        assert_eq!(dma(&mut f, &m, DMA_SKIP, u32::MAX, 0), 0);
    }
    assert_eq!(read(&mut f, 1), [0]);
}

#[test]
fn computed_files_are_made_when_they_are_read() {
    use std::sync::atomic::{AtomicU8, Ordering};
    let memory = Arc::new(GuestMemory::new(1 << 20).unwrap());
    let mut f = FwCfg::new(memory);
    let now = Arc::new(AtomicU8::new(1));
    let value = Arc::clone(&now);
    f.add_computed(Box::new(move || {
        let v = value.load(Ordering::Relaxed);
        // Above 100 its size would change, which the guest cannot be told.
        vec![("now", vec![v; if v > 100 { 2 } else { 1 }])]
    }))
    .unwrap();
    let mut read = |v| {
        now.store(v, Ordering::Relaxed);
        f.pio_write(SELECTOR, &FILE_FIRST.to_le_bytes());
        let mut b = [0];
        f.pio_read(DATA, &mut b);
        b[0]
    };
    assert_eq!((read(7), read(8), read(101)), (7, 8, 8));
    f.set_file("order", *b"one").unwrap();
    f.set_file("order", *b"three").unwrap();
    assert_eq!(f.file("order"), Some(&b"three"[..]));
    assert!(f.set_file("", *b"x").is_err());
}
