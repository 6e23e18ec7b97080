use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pyrite_vdev::Lifecycle;
use pyrite_vdev::bus::lock;

use super::packet::*;
use super::{EVENT, RX, TX, Vsock, VsockConfig};
use crate::testing::{BUFFERS_AT, Bench, fuzz_one, noise};

const OUT_AT: u64 = BUFFERS_AT;
const IN_AT: u64 = BUFFERS_AT + 0x1_0000;
const EVENT_AT: u64 = BUFFERS_AT + 0x8000;
const IN_BYTES: u32 = 0x1000;
const CID: u32 = 3;

/// A directory that goes away with the test.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::SeqCst);
        let dir = std::env::temp_dir().join(format!("pyrite-vsock-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Place(dir)
    }
    fn base(&self) -> PathBuf {
        self.0.join("s")
    }
    fn device(&self) -> Vsock {
        Vsock::new(VsockConfig {
            guest_cid: CID,
            base: self.base(),
        })
        .unwrap()
    }
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.0.join(format!("s_{port}"))).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn up(place: &Place) -> Bench {
    let mut b = Bench::new(place.device());
    b.up(0);
    for n in 0..16 {
        b.add(RX, &[(IN_AT + u64::from(n * IN_BYTES), IN_BYTES, true)]);
    }
    b.kick(RX);
    b
}

fn send(b: &mut Bench, key: (u32, u32), op: u16, flags: u32, data: &[u8], buf_alloc: u32) {
    let h = Header {
        src_cid: CID.into(),
        dst_cid: VMADDR_CID_HOST,
        src_port: key.0,
        dst_port: key.1,
        len: data.len() as u32,
        kind: VIRTIO_VSOCK_TYPE_STREAM,
        op,
        flags,
        buf_alloc,
        fwd_cnt: 0,
    };
    b.memory.write(OUT_AT, &h.encode()).unwrap();
    b.memory.write(OUT_AT + 44, data).unwrap();
    b.add(
        TX,
        &[(OUT_AT, 44, false), (OUT_AT + 44, data.len() as u32, false)],
    );
    b.kick(TX);
    b.wait_used(TX);
}

/// The next packet for the guest: ports (guest, host), op, flags, data.
fn receive(b: &mut Bench) -> ((u32, u32), u16, u32, Vec<u8>) {
    let (head, len) = b.wait_used(RX);
    let at = IN_AT + u64::from(head) * u64::from(IN_BYTES);
    let bytes = b.bytes(at, len as usize);
    let h = Header::parse(bytes.first_chunk().unwrap());
    assert_eq!((h.src_cid, h.dst_cid), (VMADDR_CID_HOST, CID.into()));
    assert_eq!(h.len as usize, bytes.len() - 44);
    (
        (h.dst_port, h.src_port),
        h.op,
        h.flags,
        bytes[44..].to_vec(),
    )
}

fn read(s: &mut UnixStream, n: usize) -> Vec<u8> {
    let mut b = vec![0; n];
    s.read_exact(&mut b).unwrap();
    b
}

#[test]
fn guest_connects_talks_and_both_ends_close() {
    let place = Place::new();
    let listener = place.listen(52);
    let mut b = up(&place);
    assert_eq!(b.config_bytes(0, 8), [3, 0, 0, 0, 0, 0, 0, 0]);
    let key = (1000, 52);
    send(&mut b, key, OP_REQUEST, 0, &[], 65536);
    assert_eq!(receive(&mut b), (key, OP_RESPONSE, 0, vec![]));
    let (mut host, _) = listener.accept().unwrap();
    send(&mut b, key, OP_RW, 0, b"hello", 65536);
    assert_eq!(read(&mut host, 5), b"hello");
    host.write_all(b"world").unwrap();
    assert_eq!(receive(&mut b), (key, OP_RW, 0, b"world".to_vec()));
    // The host's program stops sending; the guest still can.
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(receive(&mut b), (key, OP_SHUTDOWN, SHUTDOWN_F_SEND, vec![]));
    send(&mut b, key, OP_RW, 0, b"bye", 65536);
    assert_eq!(read(&mut host, 3), b"bye");
    send(
        &mut b,
        key,
        OP_SHUTDOWN,
        SHUTDOWN_F_RECEIVE | SHUTDOWN_F_SEND,
        &[],
        65536,
    );
    assert_eq!(receive(&mut b), (key, OP_RST, 0, vec![]));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn host_connects_with_a_line_and_data_right_behind_it() {
    let place = Place::new();
    let mut b = up(&place);
    let mut host = UnixStream::connect(place.base()).unwrap();
    host.write_all(b"CONNECT 1234\nearly").unwrap();
    let (key, op, _, _) = receive(&mut b);
    assert_eq!((key.0, op), (1234, OP_REQUEST));
    send(&mut b, key, OP_RESPONSE, 0, &[], 65536);
    assert_eq!(receive(&mut b), (key, OP_RW, 0, b"early".to_vec()));
    let ok = format!("OK {}\n", key.1);
    assert_eq!(read(&mut host, ok.len()), ok.as_bytes());
    drop(host);
    let (_, op, flags, _) = receive(&mut b);
    assert_eq!(op, OP_SHUTDOWN);
    // Both ends of the host's socket are gone: that is told as well, at once or after.
    if flags == SHUTDOWN_F_SEND {
        let both = SHUTDOWN_F_RECEIVE | SHUTDOWN_F_SEND;
        assert_eq!(receive(&mut b), (key, OP_SHUTDOWN, both, vec![]));
    }
}

#[test]
fn nonsense_from_the_host_is_hung_up_on() {
    let place = Place::new();
    let _b = up(&place);
    for line in [&b"HELLO\n"[..], b"CONNECT x\n", &[b'A'; 100]] {
        let mut host = UnixStream::connect(place.base()).unwrap();
        host.write_all(line).unwrap();
        // Closed, possibly with our bytes unread.
        assert!(matches!(host.read(&mut [0]), Ok(0) | Err(_)));
    }
}

#[test]
fn refused_and_unknown_connections_are_reset() {
    let place = Place::new();
    let mut b = up(&place);
    send(&mut b, (1, 99), OP_REQUEST, 0, &[], 4096);
    assert_eq!(receive(&mut b), ((1, 99), OP_RST, 0, vec![]));
    send(&mut b, (5, 6), OP_RW, 0, b"x", 4096);
    assert_eq!(receive(&mut b), ((5, 6), OP_RST, 0, vec![]));
    // A reset for nothing is not answered.
    send(&mut b, (5, 6), OP_RST, 0, &[], 4096);
    send(&mut b, (7, 8), OP_RW, 0, b"x", 4096);
    assert_eq!(receive(&mut b), ((7, 8), OP_RST, 0, vec![]));
}

#[test]
fn host_data_waits_for_the_guests_credit() {
    let place = Place::new();
    let listener = place.listen(1);
    let mut b = up(&place);
    let key = (9, 1);
    send(&mut b, key, OP_REQUEST, 0, &[], 4);
    assert_eq!(receive(&mut b).1, OP_RESPONSE);
    let (mut host, _) = listener.accept().unwrap();
    host.write_all(b"abcdefgh").unwrap();
    assert_eq!(receive(&mut b), (key, OP_RW, 0, b"abcd".to_vec()));
    send(&mut b, key, OP_CREDIT_REQUEST, 0, &[], 4);
    assert_eq!(receive(&mut b), (key, OP_CREDIT_UPDATE, 0, vec![]));
    send(&mut b, key, OP_CREDIT_UPDATE, 0, &[], 100);
    assert_eq!(receive(&mut b), (key, OP_RW, 0, b"efgh".to_vec()));
}

#[test]
fn driver_reset_closes_connections() {
    let place = Place::new();
    let listener = place.listen(1);
    let mut b = up(&place);
    send(&mut b, (9, 1), OP_REQUEST, 0, &[], 4096);
    assert_eq!(receive(&mut b).1, OP_RESPONSE);
    let (mut host, _) = listener.accept().unwrap();
    b.set_status(0);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn restored_guest_hears_that_connections_are_gone() {
    let (place, other_place) = (Place::new(), Place::new());
    let mut b = up(&place);
    b.add(EVENT, &[(EVENT_AT, 4, true)]);
    b.memory.write(EVENT_AT, &[9; 4]).unwrap();
    let mut other = Bench::with_memory(Arc::clone(&b.memory), other_place.device());
    b.save_restore_save(&other);
    std::mem::swap(&mut other.rings, &mut b.rings);
    lock(&other.device).start();
    assert_eq!(other.wait_used(EVENT).1, 4);
    assert_eq!(other.bytes(EVENT_AT, 4), [0; 4]);
}

#[test]
fn noise_neither_panics_nor_hangs() {
    for seed in 0..20 {
        let place = Place::new();
        fuzz_one(place.device(), !((seed & 1) << 34), &noise(seed, 4000));
    }
}
