//! Shared folders: the 9P transport and the file system device. virtio 1.3 §5.11 (virtio-fs); 9P
//! is device type 9, which the standard reserves and Linux's `virtio_9p.h` describes.
//!
//! Both move messages between a queue and a [`FileServer`]; one thread handles them in order. A
//! saved device has what the guest has open by path, and opens it again when it is restored.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use minicbor::{Decode, Encode};
use pyrite_share::{FileServer, Folder, fuse, p9};
use pyrite_state::{Inspect, StateError};
use pyrite_vdev::bus::lock;

use crate::device::{VirtioDevice, decode_body, encode_body, read_config};
use crate::link::DriverLink;
use crate::spec::{VIRTIO_ID_9P, VIRTIO_ID_FS};
use crate::worker::Worker;

#[cfg(test)]
mod tests;

/// LIMIT: bytes of a tag. virtio 1.3 §5.11.4.
pub const MAX_TAG_BYTES: usize = 36;
/// The tag is in the configuration.
const VIRTIO_9P_MOUNT_TAG: u32 = 0;
/// Entries of the 9P queue: as many as Linux's driver uses at a time.
const P9_QUEUE_SIZE: u16 = 128;
/// Entries of the queue for what must not wait (forgotten nodes).
const HIPRIO_QUEUE_SIZE: u16 = 128;
/// Entries of the request queue: room for the pages of the largest message.
const FS_QUEUE_SIZE: u16 = 1024;

/// What a guest speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShareProtocol {
    /// 9P2000.L.
    P9,
    /// FUSE.
    Virtiofs,
}

struct Shared {
    link: OnceLock<Arc<DriverLink>>,
    // LOCK ORDER: server < queue.
    server: Mutex<Box<dyn FileServer>>,
    /// The driver was reset: what its guest had open is closed before the next message.
    reset: AtomicBool,
    messages: AtomicU64,
    max_message_bytes: u64,
}

impl Shared {
    fn server(&self) -> std::sync::MutexGuard<'_, Box<dyn FileServer>> {
        let mut server = lock(&self.server);
        if self.reset.swap(false, Ordering::SeqCst) {
            server.reset();
        }
        server
    }

    /// Handles what is in a queue.
    fn serve(&self, queue: usize) {
        let Some(link) = self.link.get() else { return };
        // A reset alone has to close files, too.
        drop(self.server());
        let (mut message, mut reply) = (Vec::new(), Vec::new());
        while let Some(chain) = link.pop(queue) {
            let len = chain.readable_len();
            let mut written = 0;
            // A longer one breaks what was agreed on; it comes back without an answer.
            if len <= self.max_message_bytes {
                message.resize(len as usize, 0);
                let n = chain.read_at(link.memory(), 0, &mut message);
                let room = chain.writable_len().min(self.max_message_bytes) as usize;
                reply.clear();
                let message = message.get(..n).unwrap_or_default();
                self.server().handle(message, room, &mut reply);
                written = chain.write_at(link.memory(), 0, &reply);
            }
            self.messages.fetch_add(1, Ordering::Relaxed);
            link.complete(queue, chain, written as u32);
        }
    }
}

/// The device.
pub struct Share {
    protocol: ShareProtocol,
    tag: String,
    shared: Arc<Shared>,
    worker: Worker,
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedShare {
    #[n(0)]
    tag: String,
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    session: Vec<u8>,
}

impl Share {
    /// A device that shows a folder under a tag, of at most [`MAX_TAG_BYTES`]; starts its thread.
    pub fn new(protocol: ShareProtocol, tag: &str, folder: Arc<Folder>) -> std::io::Result<Share> {
        let (name, server, max): (_, Box<dyn FileServer>, _) = match protocol {
            ShareProtocol::P9 => (
                "virtio-9p",
                Box::new(p9::Server::new(folder)),
                p9::MAX_MESSAGE_BYTES,
            ),
            ShareProtocol::Virtiofs => (
                "virtio-fs",
                Box::new(fuse::Server::new(folder)),
                fuse::MAX_MESSAGE_BYTES,
            ),
        };
        let shared = Arc::new(Shared {
            link: OnceLock::new(),
            server: Mutex::new(server),
            reset: AtomicBool::new(false),
            messages: AtomicU64::new(0),
            max_message_bytes: max.into(),
        });
        let theirs = Arc::clone(&shared);
        let worker = Worker::new(name, move |queue| theirs.serve(queue))?;
        let mut tag = tag.to_owned();
        tag.truncate(MAX_TAG_BYTES);
        Ok(Share {
            protocol,
            tag,
            shared,
            worker,
        })
    }

    fn unit(&self) -> &str {
        self.shared.link.get().map_or("virtio-share", |l| l.name())
    }
}

impl VirtioDevice for Share {
    fn device_type(&self) -> u16 {
        match self.protocol {
            ShareProtocol::P9 => VIRTIO_ID_9P,
            ShareProtocol::Virtiofs => VIRTIO_ID_FS,
        }
    }
    fn class_code(&self) -> u32 {
        // Mass storage, other.
        0x01_80_00
    }
    fn features(&self) -> u64 {
        match self.protocol {
            ShareProtocol::P9 => 1 << VIRTIO_9P_MOUNT_TAG,
            ShareProtocol::Virtiofs => 0,
        }
    }
    fn queue_sizes(&self) -> Vec<u16> {
        match self.protocol {
            ShareProtocol::P9 => vec![P9_QUEUE_SIZE],
            ShareProtocol::Virtiofs => vec![HIPRIO_QUEUE_SIZE, FS_QUEUE_SIZE],
        }
    }
    fn attach(&mut self, link: Arc<DriverLink>) {
        let _ = self.shared.link.set(link);
    }
    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        let tag = self.tag.as_bytes();
        let mut image = Vec::new();
        match self.protocol {
            ShareProtocol::P9 => {
                image.extend_from_slice(&(tag.len() as u16).to_le_bytes());
                image.extend_from_slice(tag);
            }
            // virtio 1.3 §5.11.4: tag, padded, and num_request_queues.
            ShareProtocol::Virtiofs => {
                image.extend_from_slice(tag);
                image.resize(MAX_TAG_BYTES, 0);
                image.extend_from_slice(&1_u32.to_le_bytes());
            }
        }
        read_config(&image, offset, data);
    }
    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self) {}
    fn notify(&mut self, queue: usize) {
        self.worker.kick(queue);
    }
    fn reset(&mut self) {
        // The thread may be in the middle of a message, which takes as long as the host's disk.
        self.shared.reset.store(true, Ordering::SeqCst);
        self.worker.kick(0);
    }
    fn start(&mut self) {}
    fn pause(&mut self) {}
    fn drained(&mut self) -> bool {
        true
    }
    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(encode_body(&SavedShare {
            tag: self.tag.clone(),
            session: self.shared.server().save(),
        }))
    }
    fn restore(&mut self, body: &[u8], _active: bool) -> Result<(), StateError> {
        let SavedShare { tag, session } = decode_body(self.unit(), body)?;
        let invalid = |detail| StateError::Invalid {
            unit: self.unit().to_owned(),
            detail,
        };
        if tag != self.tag {
            return Err(invalid(format!("has tag {tag}, here is {}", self.tag)));
        }
        let restored = self.shared.server().restore(&session);
        restored.map_err(|e| invalid(e.to_string()))
    }
    fn inspect(&self) -> Inspect {
        // The thread has the server for as long as a message takes.
        let counts = self.shared.server.try_lock().map(|s| s.counts());
        let (known, open) = counts.unwrap_or_default();
        let messages = self.shared.messages.load(Ordering::Relaxed);
        Inspect::node([
            ("tag", Inspect::Text(self.tag.clone())),
            ("messages", Inspect::Uint(messages)),
            ("known", Inspect::Uint(known as u64)),
            ("open", Inspect::Uint(open as u64)),
        ])
    }
}
