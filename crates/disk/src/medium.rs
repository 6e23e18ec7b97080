//! The tray of a drive whose medium can be changed: shared by the drive, which acts for the guest,
//! and the host's control.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minicbor::{Decode, Encode};

use crate::BlockBackend;

/// What happened to the medium, as GET EVENT STATUS NOTIFICATION tells it. MMC-6 table 304.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum MediaEvent {
    /// Nothing.
    #[default]
    #[n(0)]
    None,
    /// Somebody wants the medium out.
    #[n(1)]
    EjectRequest,
    /// There is a medium that can be used.
    #[n(2)]
    NewMedia,
    /// The medium was taken out.
    #[n(3)]
    Removal,
}

/// The guest has locked the tray.
#[derive(Debug, thiserror::Error)]
#[error(
    "the guest has locked the tray and was asked to eject; unmount the medium there, or use force"
)]
pub struct Locked;

/// State that is saved with the drive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TraySaved {
    #[n(0)]
    open: bool,
    #[n(1)]
    locked: bool,
    #[n(2)]
    event: MediaEvent,
    #[n(3)]
    changed: bool,
    /// Size of the medium, to notice that another one lies there on restore.
    #[n(4)]
    size_bytes: Option<u64>,
}

#[derive(Default)]
struct Inner {
    medium: Option<Arc<dyn BlockBackend>>,
    open: bool,
    locked: bool,
    event: MediaEvent,
    /// A new medium that the guest has not been told of by a unit attention.
    changed: bool,
}

/// The tray.
#[derive(Default)]
pub struct Tray {
    inner: Mutex<Inner>,
}

impl Tray {
    /// A closed tray, with a medium or empty.
    pub fn new(medium: Option<Arc<dyn BlockBackend>>) -> Arc<Tray> {
        Arc::new(Tray {
            inner: Mutex::new(Inner {
                medium,
                ..Inner::default()
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The medium, unless the tray is open or empty.
    pub fn medium(&self) -> Option<Arc<dyn BlockBackend>> {
        let t = self.lock();
        if t.open { None } else { t.medium.clone() }
    }

    /// The tray is open.
    pub fn is_open(&self) -> bool {
        self.lock().open
    }

    /// The guest has locked the tray.
    pub fn is_locked(&self) -> bool {
        self.lock().locked
    }

    /// The host puts a medium in, in place of the one there is, and closes the tray. Requests in
    /// flight still go to the old one.
    pub fn insert(&self, medium: Arc<dyn BlockBackend>, force: bool) -> Result<(), Locked> {
        let mut t = self.lock();
        if t.locked && !force && t.medium.is_some() {
            t.event = MediaEvent::EjectRequest;
            return Err(Locked);
        }
        t.medium = Some(medium);
        t.open = false;
        t.event = MediaEvent::NewMedia;
        t.changed = true;
        Ok(())
    }

    /// The host opens the tray and takes the medium out.
    pub fn remove(&self, force: bool) -> Result<(), Locked> {
        let mut t = self.lock();
        if t.locked && !force && t.medium.is_some() {
            t.event = MediaEvent::EjectRequest;
            return Err(Locked);
        }
        if t.medium.take().is_some() || !t.open {
            t.event = MediaEvent::Removal;
        }
        t.open = true;
        t.locked = false;
        t.changed = false;
        Ok(())
    }

    /// The guest opens or closes the tray; the medium stays in it, so that closing it is no change
    /// of the medium. Opening a locked one fails.
    pub fn set_open(&self, open: bool) -> Result<(), Locked> {
        let mut t = self.lock();
        if open == t.open {
            return Ok(());
        }
        if open && t.locked {
            return Err(Locked);
        }
        t.open = open;
        if t.medium.is_some() {
            t.event = if open {
                MediaEvent::Removal
            } else {
                MediaEvent::NewMedia
            };
        }
        Ok(())
    }

    /// The guest locks or unlocks the tray.
    pub fn set_locked(&self, locked: bool) {
        self.lock().locked = locked;
    }

    /// What happened since the last call.
    pub fn take_event(&self) -> MediaEvent {
        std::mem::take(&mut self.lock().event)
    }

    /// True once after a medium came in.
    pub fn take_changed(&self) -> bool {
        std::mem::take(&mut self.lock().changed)
    }

    /// Power-on state: unlocked, closed if there is a medium. What lies in it stays.
    pub fn reset(&self) {
        let mut t = self.lock();
        t.open = t.open && t.medium.is_none();
        t.locked = false;
        t.event = MediaEvent::None;
        t.changed = false;
    }

    /// The state; the medium itself is the host's matter.
    pub fn save(&self) -> TraySaved {
        let t = self.lock();
        TraySaved {
            open: t.open,
            locked: t.locked,
            event: t.event,
            changed: t.changed,
            size_bytes: t.medium.as_ref().map(|m| m.info().size_bytes),
        }
    }

    /// Takes a state over. If another medium lies there than was saved, the guest is told that it
    /// was changed.
    pub fn restore(&self, saved: &TraySaved) {
        let TraySaved {
            open,
            locked,
            event,
            changed,
            size_bytes,
        } = saved;
        let mut t = self.lock();
        t.open = *open;
        t.locked = *locked;
        t.event = *event;
        t.changed = *changed;
        let now = t.medium.as_ref().map(|m| m.info().size_bytes);
        if now != *size_bytes && !t.open {
            t.changed = now.is_some();
            t.event = if now.is_some() {
                MediaEvent::NewMedia
            } else {
                MediaEvent::Removal
            };
        }
    }
}
