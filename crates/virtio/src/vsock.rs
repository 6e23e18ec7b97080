//! Socket device: streams between guest ports and Unix sockets of the host. virtio 1.3 §5.10.
//!
//! With a base path `vm.sock`: a guest that connects to port P of CID 2 is connected to the
//! listening socket `vm.sock_P`; a host program that connects to `vm.sock` and sends
//! `CONNECT P\n` is connected to port P of the guest and reads `OK <host port>\n` once the guest
//! has accepted.
//!
//! One thread owns the sockets and connections and waits with `poll`. Open connections are not
//! saved: a restored guest is told with a transport-reset event, and its sockets fail.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use minicbor::{Decode, Encode};
use pyrite_state::{Inspect, StateError};

use crate::device::{VirtioDevice, decode_body, encode_body, read_config};
use crate::link::DriverLink;
use crate::spec::VIRTIO_ID_VSOCK;

mod connection;
mod packet;
mod poll;
mod switchboard;
#[cfg(test)]
mod tests;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// How the device is shown to the guest, and where its sockets are.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub guest_cid: u32,
    /// Socket for host programs, and prefix of those that the guest connects to.
    pub base: PathBuf,
}

/// What the device tells its thread.
struct Orders {
    link: OnceLock<Arc<DriverLink>>,
    stop: AtomicBool,
    /// Drop every connection: the driver was reset.
    reset: AtomicBool,
    /// Tell the driver that its connections are gone.
    transport_reset: AtomicBool,
    connections: AtomicUsize,
}

/// The device.
pub struct Vsock {
    config: VsockConfig,
    orders: Arc<Orders>,
    wake: UnixStream,
    restored: bool,
    thread: Option<JoinHandle<()>>,
}

impl Vsock {
    /// Listens on the base path, which must not exist yet, and starts the thread.
    pub fn new(config: VsockConfig) -> std::io::Result<Vsock> {
        let listener = UnixListener::bind(&config.base)?;
        listener.set_nonblocking(true)?;
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let orders = Arc::new(Orders {
            link: OnceLock::new(),
            stop: AtomicBool::new(false),
            reset: AtomicBool::new(false),
            transport_reset: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
        });
        let theirs = Arc::clone(&orders);
        let board = switchboard::Switchboard::new(config.clone(), theirs, listener, woken);
        let thread = std::thread::Builder::new()
            .name("virtio-vsock".into())
            .spawn(move || board.run())?;
        Ok(Vsock {
            config,
            orders,
            wake,
            restored: false,
            thread: Some(thread),
        })
    }

    fn wake(&self) {
        // A full pipe wakes as well.
        let _ = (&self.wake).write(&[0]);
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.orders.stop.store(true, Ordering::SeqCst);
        self.wake();
        if let Some(t) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = t.join();
        }
        if let Err(e) = std::fs::remove_file(&self.config.base) {
            tracing::debug!("vsock socket not removed: {e}");
        }
    }
}

#[derive(Encode, Decode)]
#[cbor(map)]
struct SavedVsock {
    #[n(0)]
    guest_cid: u32,
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u16 {
        VIRTIO_ID_VSOCK
    }
    fn class_code(&self) -> u32 {
        0x07_80_00
    }
    fn features(&self) -> u64 {
        // None: without VIRTIO_VSOCK_F_STREAM there are only streams, §5.10.3.
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![256, 256, 16]
    }
    fn attach(&mut self, link: Arc<DriverLink>) {
        let _ = self.orders.link.set(link);
    }
    fn config_read(&mut self, offset: u64, data: &mut [u8]) {
        read_config(
            &u64::from(self.config.guest_cid).to_le_bytes(),
            offset,
            data,
        );
    }
    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self) {
        self.wake();
    }
    fn notify(&mut self, _queue: usize) {
        self.wake();
    }
    fn reset(&mut self) {
        self.restored = false;
        self.orders.transport_reset.store(false, Ordering::SeqCst);
        self.orders.reset.store(true, Ordering::SeqCst);
        self.wake();
    }
    fn start(&mut self) {
        if std::mem::take(&mut self.restored) {
            self.orders.transport_reset.store(true, Ordering::SeqCst);
        }
        self.wake();
    }
    fn pause(&mut self) {
        self.wake();
    }
    fn drained(&mut self) -> bool {
        true
    }
    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(encode_body(&SavedVsock {
            guest_cid: self.config.guest_cid,
        }))
    }
    fn restore(&mut self, body: &[u8], active: bool) -> Result<(), StateError> {
        let unit = self.orders.link.get().map_or("virtio-vsock", |l| l.name());
        // A changed id is no error: the driver reads it again after the transport reset.
        let SavedVsock { guest_cid: _ } = decode_body(unit, body)?;
        self.restored = active;
        Ok(())
    }
    fn inspect(&self) -> Inspect {
        Inspect::node([
            ("guest_cid", Inspect::Uint(u64::from(self.config.guest_cid))),
            (
                "base",
                Inspect::Text(self.config.base.display().to_string()),
            ),
            (
                "connections",
                Inspect::Uint(self.orders.connections.load(Ordering::Relaxed) as u64),
            ),
        ])
    }
}
