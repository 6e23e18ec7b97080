use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pyrite_share::{Folder, FolderConfig, Owner};
use pyrite_vdev::Lifecycle;
use pyrite_vdev::bus::lock;

use super::{Share, ShareProtocol};
use crate::testing::{BUFFERS_AT, Bench, fuzz_one, noise};

/// A temporary folder that goes away when dropped.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("pyrite-vshare-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("file"), "hello").unwrap();
        Dir(dir)
    }

    fn share(&self, protocol: ShareProtocol) -> Share {
        let config = FolderConfig {
            path: self.0.clone(),
            read_only: false,
            owner: Owner::Squash,
            max_descriptors: 100,
        };
        let folder = Arc::new(Folder::open(&config).unwrap());
        Share::new(protocol, "tag", folder).unwrap()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Sends a message in two pieces, takes the reply in two.
fn ask(b: &mut Bench, queue: usize, message: &[u8]) -> Vec<u8> {
    let (out, back) = (BUFFERS_AT, BUFFERS_AT + 0x1000);
    b.memory.write(out, message).unwrap();
    let rest = message.len() as u32 - 7;
    let chain = [
        (out, 7, false),
        (out + 7, rest, false),
        (back, 7, true),
        (back + 7, 4096, true),
    ];
    b.add(queue, &chain);
    b.kick(queue);
    let (_, len) = b.wait_used(queue);
    b.bytes(back, len as usize)
}

/// `Tversion` and `Tattach` to fid 1.
fn mount_9p(b: &mut Bench) {
    let version = b"\x15\0\0\0\x64\xff\xff\0\0\x01\0\x08\x009P2000.L";
    let reply = ask(b, 0, version);
    assert_eq!(reply[4..13], *b"\x65\xff\xff\0\0\x01\0\x08\0");
    let attach = b"\x17\0\0\0\x68\0\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0";
    assert_eq!(ask(b, 0, attach)[4], 0x69);
}

/// `Tgetattr` of fid 1: the type of the answer.
fn getattr(b: &mut Bench) -> u8 {
    ask(b, 0, b"\x13\0\0\0\x18\0\0\x01\0\0\0\xff\x07\0\0\0\0\0\0")[4]
}

#[test]
fn tags_are_where_drivers_look_for_them() {
    let dir = Dir::new();
    let b = Bench::new(dir.share(ShareProtocol::P9));
    assert_eq!(b.config_bytes(0, 6), b"\x03\0tag\0");
    assert_eq!(b.offered() & 1, 1);
    let b = Bench::new(dir.share(ShareProtocol::Virtiofs));
    let config = b.config_bytes(0, 44);
    assert_eq!(config[..4], *b"tag\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_session_lives_until_the_driver_resets_and_is_saved() {
    let dir = Dir::new();
    let mut b = Bench::new(dir.share(ShareProtocol::P9));
    b.up(1);
    mount_9p(&mut b);
    assert_eq!(getattr(&mut b), 0x19);
    let mut other = Bench::new(dir.share(ShareProtocol::P9));
    b.save_restore_save(&other);
    drop(b);
    lock(&other.device).start();
    other.set_status(0);
    other.negotiate(1);
    other.set_status(15);
    assert_eq!(getattr(&mut other), 7, "fids of the old session are gone");
    mount_9p(&mut other);
    assert_eq!(getattr(&mut other), 0x19);
}

#[test]
fn virtiofs_looks_a_file_up_and_forgets_it() {
    let dir = Dir::new();
    let mut b = Bench::new(dir.share(ShareProtocol::Virtiofs));
    b.up(0);
    let request = |op: u32, node: u64, body: &[u8]| {
        let mut m = (40 + body.len() as u32).to_le_bytes().to_vec();
        m.extend(op.to_le_bytes());
        m.extend(9_u64.to_le_bytes());
        m.extend(node.to_le_bytes());
        m.extend([0; 16]);
        m.extend(body);
        m
    };
    let init: Vec<u8> = [7_u32, 38, 0, 0]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    let reply = ask(&mut b, 1, &request(26, 0, &init));
    assert_eq!((reply.len(), &reply[4..8]), (80, &[0; 4][..]));
    let reply = ask(&mut b, 1, &request(1, 1, b"file\0"));
    assert_eq!((reply.len(), &reply[4..8]), (144, &[0; 4][..]));
    let node = u64::from_le_bytes(reply[16..24].try_into().unwrap());
    // Without an answer, and without room for one.
    let m = request(2, node, &1_u64.to_le_bytes());
    b.memory.write(BUFFERS_AT, &m).unwrap();
    b.add(0, &[(BUFFERS_AT, m.len() as u32, false)]);
    b.kick(0);
    assert_eq!(b.wait_used(0).1, 0);
    let reply = ask(&mut b, 1, &request(3, node, &[0; 16]));
    assert_eq!(reply[4..8], (-libc::ESTALE).to_le_bytes());
}

#[test]
fn noise_neither_panics_nor_hangs() {
    for protocol in [ShareProtocol::P9, ShareProtocol::Virtiofs] {
        for seed in 0..20 {
            for features in [!(1 << 34), u64::MAX] {
                let dir = Dir::new();
                fuzz_one(dir.share(protocol), features, &noise(seed, 6000));
            }
        }
    }
}
