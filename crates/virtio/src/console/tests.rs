use std::sync::{Arc, Mutex, OnceLock};

use pyrite_vdev::Lifecycle;
use pyrite_vdev::bus::lock;

use super::*;
use crate::testing::{BUFFERS_AT, Bench, fuzz_one, noise};

const OUT_AT: u64 = BUFFERS_AT;
const IN_AT: u64 = BUFFERS_AT + 0x1_0000;
const ALL: u64 = !(1 << 34);

/// Takes `room` bytes.
#[derive(Default)]
struct Peer {
    sink: OnceLock<Arc<dyn PortSink>>,
    taken: Mutex<Vec<u8>>,
    room: Mutex<usize>,
    ready: Mutex<u32>,
    open: Mutex<bool>,
}

impl PortBackend for Peer {
    fn attach(&self, guest: Arc<dyn PortSink>) {
        let _ = self.sink.set(guest);
    }
    fn write(&self, bytes: &[u8]) -> usize {
        let mut room = lock(&self.room);
        let n = bytes.len().min(*room);
        *room -= n;
        lock(&self.taken).extend_from_slice(&bytes[..n]);
        n
    }
    fn input_ready(&self) {
        *lock(&self.ready) += 1;
    }
    fn guest_open(&self, open: bool) {
        *lock(&self.open) = open;
    }
}

fn console(room: usize) -> (Vec<Arc<Peer>>, Console) {
    let peers: Vec<Arc<Peer>> = (0..2)
        .map(|_| {
            Arc::new(Peer {
                room: Mutex::new(room),
                ..Peer::default()
            })
        })
        .collect();
    let ports = peers
        .iter()
        .enumerate()
        .map(|(n, p)| PortConfig {
            name: if n == 0 {
                String::new()
            } else {
                "agent".into()
            },
            console: n == 0,
            backend: Arc::clone(p) as _,
        })
        .collect();
    (peers, Console::new(ports))
}

fn sink(p: &Peer) -> &Arc<dyn PortSink> {
    p.sink.get().unwrap()
}

fn control(b: &mut Bench, id: u32, event: u16, value: u16) {
    let mut m = id.to_le_bytes().to_vec();
    m.extend_from_slice(&event.to_le_bytes());
    m.extend_from_slice(&value.to_le_bytes());
    b.memory.write(OUT_AT, &m).unwrap();
    b.add(CONTROL_TX, &[(OUT_AT, 8, false)]);
    b.kick(CONTROL_TX);
    assert!(b.used(CONTROL_TX).is_some());
}

/// Collects (id, event, value, rest) of the messages that came.
fn messages(b: &mut Bench) -> Vec<(u32, u16, u16, Vec<u8>)> {
    let mut out = Vec::new();
    while let Some((head, len)) = b.used(CONTROL_RX) {
        let m = b.bytes(IN_AT + 0x40 * u64::from(head), len as usize);
        let (id, event, value) = control::parse(*m.first_chunk().unwrap());
        out.push((id, event, value, m[8..].to_vec()));
    }
    out
}

fn up(b: &mut Bench) {
    b.up(ALL);
    for n in 0..32 {
        b.add(CONTROL_RX, &[(IN_AT + 0x40 * n, 0x40, true)]);
    }
    b.kick(CONTROL_RX);
}

#[test]
fn ports_are_introduced_and_opened() {
    let (peers, c) = console(1000);
    let mut b = Bench::new(c);
    up(&mut b);
    assert_eq!(b.config_bytes(4, 4), [2, 0, 0, 0]);
    sink(&peers[0]).resize(80, 25);
    control(&mut b, 0, 0, 1);
    assert_eq!(messages(&mut b), [(0, 1, 1, vec![]), (1, 1, 1, vec![])]);
    control(&mut b, 0, 3, 1);
    let expected = [
        (0, 4, 1, vec![]),
        (0, 5, 0, vec![80, 0, 25, 0]),
        (0, 6, 1, vec![]),
    ];
    assert_eq!(messages(&mut b), expected);
    control(&mut b, 1, 3, 1);
    assert_eq!(
        messages(&mut b),
        [(1, 7, 1, b"agent".to_vec()), (1, 6, 1, vec![])]
    );
    control(&mut b, 1, 6, 1);
    assert!(*lock(&peers[1].open));
    sink(&peers[1]).set_host_open(false);
    assert_eq!(messages(&mut b), [(1, 6, 0, vec![])]);
    sink(&peers[0]).resize(132, 50);
    assert_eq!(messages(&mut b), [(0, 5, 0, vec![132, 0, 50, 0])]);
    assert_eq!(b.config_bytes(0, 4), [132, 0, 50, 0]);
    // Unknown ports and events change nothing.
    control(&mut b, 99, 3, 1);
    control(&mut b, 99, 6, 1);
    control(&mut b, 0, 77, 1);
    assert_eq!(messages(&mut b), []);
}

#[test]
fn output_waits_for_a_slow_backend_and_survives_a_restore() {
    let (peers, c) = console(3);
    let mut b = Bench::new(c);
    b.up(ALL);
    b.memory.write(OUT_AT, b"hello world").unwrap();
    b.add(1, &[(OUT_AT, 6, false), (OUT_AT + 6, 5, false)]);
    b.kick(1);
    assert_eq!(b.used(1), None);
    assert_eq!(*lock(&peers[0].taken), b"hel");
    let (peers, c) = console(100);
    let mut other = Bench::with_memory(Arc::clone(&b.memory), c);
    b.save_restore_save(&other);
    std::mem::swap(&mut other.rings, &mut b.rings);
    lock(&other.device).start();
    assert!(other.used(1).is_some());
    assert_eq!(*lock(&peers[0].taken), b"lo world");
    *lock(&peers[0].room) = 0;
    other.add(1, &[(OUT_AT, 2, false)]);
    other.kick(1);
    assert_eq!(other.used(1), None);
    *lock(&peers[0].room) = 9;
    sink(&peers[0]).output_ready();
    assert!(other.used(1).is_some());
}

#[test]
fn input_stops_without_buffers_and_goes_on() {
    let (peers, c) = console(0);
    let mut b = Bench::new(c);
    b.up(0);
    b.add(0, &[(IN_AT, 4, true)]);
    assert_eq!(sink(&peers[0]).receive(b"abcdef"), 4);
    assert_eq!(b.used(0), Some((0, 4)));
    assert_eq!(b.bytes(IN_AT, 4), b"abcd");
    let before = *lock(&peers[0].ready);
    b.add(0, &[(IN_AT, 4, true)]);
    b.kick(0);
    assert_eq!(*lock(&peers[0].ready), before + 1);
    assert_eq!(sink(&peers[0]).receive(b"ef"), 2);
    assert_eq!(b.used(0).map(|u| u.1), Some(2));
}

#[test]
fn closed_channel_takes_no_input_until_opened() {
    let (peers, c) = console(0);
    let mut b = Bench::new(c);
    up(&mut b);
    let (rx, _) = queues(1);
    b.add(rx, &[(IN_AT + 0x4000, 4, true)]);
    assert_eq!(sink(&peers[1]).receive(b"x"), 0);
    let before = *lock(&peers[1].ready);
    control(&mut b, 1, 6, 1);
    assert_eq!(*lock(&peers[1].ready), before + 1);
    assert_eq!(sink(&peers[1]).receive(b"x"), 1);
    b.set_status(0);
    assert!(!*lock(&peers[1].open));
}

#[test]
fn emergency_write_works_before_the_driver() {
    let (peers, c) = console(10);
    let b = Bench::new(c);
    b.write(0x2008, &u32::from(b'!').to_le_bytes());
    assert_eq!(*lock(&peers[0].taken), b"!");
}

#[test]
fn noise_neither_panics_nor_hangs() {
    for seed in 0..40 {
        let (_peers, c) = console(500);
        fuzz_one(c, !((seed & 1) << 34), &noise(seed, 6000));
    }
}
