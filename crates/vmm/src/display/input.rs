//! The queue of input events, and the thread that hands them to the guest.
//!
//! They go to keyboard and tablet on USB as soon as the guest uses those, and to the PS/2 keyboard and
//! mouse otherwise.
//!
//! The guest's keyboard takes a few keys at a time. What it has no room for waits here, in order,
//! and while the VM is paused everything does. Events that find the queue full are dropped.
//!
//! LOCK ORDER: no lock of this module is held while a device is called.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use pyrite_devices::i8042::I8042;
use pyrite_devices::usb::device::{self, Heard};
use pyrite_devices::usb::xhci::Xhci;
use pyrite_vdev::bus::lock;

use super::keys::{self, KeyCode};

/// LIMIT: events that wait.
const QUEUE: usize = 1 << 16;
/// How soon a full keyboard is tried again.
const RETRY: Duration = Duration::from_millis(2);
/// Time between typed keys: as fast as programs that poll the keyboard slowly can follow.
const TYPING_GAP: Duration = Duration::from_millis(4);

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputEvent {
    /// A key goes down or up.
    Key {
        /// Which.
        code: KeyCode,
        /// Down.
        is_down: bool,
    },
    /// The mouse moves.
    Pointer {
        /// Counts to the right.
        dx: i32,
        /// Counts downwards.
        dy: i32,
        /// Notches of the wheel towards the user.
        dz: i32,
        /// Buttons held: 1 left, 2 right, 4 middle, 8 and 16 side buttons.
        buttons: u8,
        /// Where it is then, if that is known: from the left and the upper edge (0) to the right
        /// and the lower one (7FFFH).
        at: Option<(u16, u16)>,
    },
    /// Time for the guest to follow.
    Gap,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<InputEvent>,
    paused: bool,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    usb: Option<Weak<Mutex<Xhci>>>,
}

/// The input of a machine. Clones are the same input.
#[derive(Clone)]
pub struct Input(Arc<Shared>);

impl Input {
    /// Input for a keyboard controller and perhaps devices on USB, held back until
    /// [`Input::pause`] lets it through.
    pub fn new(
        keyboard: &Arc<Mutex<I8042>>,
        usb: Option<&Arc<Mutex<Xhci>>>,
    ) -> std::io::Result<Input> {
        let shared = Arc::new(Shared {
            usb: usb.map(Arc::downgrade),
            ..Shared::default()
        });
        lock(&shared.queue).paused = true;
        let input = Input(Arc::clone(&shared));
        let keyboard = Arc::downgrade(keyboard);
        std::thread::Builder::new()
            .name("input".into())
            .spawn(move || shared.deliver(&keyboard))?;
        Ok(input)
    }

    /// The pointer goes to a place, presses and lets go `buttons` there, and turns the wheel by `dz`.
    pub fn point(at: (u16, u16), buttons: u8, dz: i32) -> Vec<InputEvent> {
        let pointer = |buttons, dz| InputEvent::Pointer {
            dx: 0,
            dy: 0,
            dz,
            buttons,
            at: Some(at),
        };
        let mut events = vec![pointer(0, dz)];
        if buttons != 0 {
            let click = [InputEvent::Gap, pointer(buttons, 0), InputEvent::Gap];
            events.extend(click);
            events.push(pointer(0, 0));
        }
        events
    }

    /// Puts events at the end of the queue: all of them, or none if there is no room.
    pub fn send(&self, events: &[InputEvent]) -> bool {
        let mut q = lock(&self.0.queue);
        if q.events.len() + events.len() > QUEUE {
            return false;
        }
        for e in events {
            // Movement adds up while nobody takes it.
            match (q.events.back_mut(), e) {
                (
                    Some(InputEvent::Pointer {
                        dx,
                        dy,
                        dz,
                        buttons,
                        at,
                    }),
                    InputEvent::Pointer {
                        dx: x,
                        dy: y,
                        dz: z,
                        buttons: b,
                        at: new,
                    },
                ) if buttons == b => {
                    *at = *new;
                    *dx = dx.saturating_add(*x);
                    *dy = dy.saturating_add(*y);
                    *dz = dz.saturating_add(*z);
                }
                _ => q.events.push_back(*e),
            }
        }
        self.0.changed.notify_all();
        true
    }

    /// The guest wants to know where the pointer is, rather than how it moves.
    pub fn wants_place(&self) -> bool {
        self.0.usb().is_some_and(|u| lock(&u).wants_pointer())
    }

    /// Types characters. Says which one has no key.
    pub fn text(text: &str) -> Result<Vec<InputEvent>, String> {
        let mut events = Vec::new();
        for c in text.chars() {
            let (code, shift) = keys::of_char(c).ok_or_else(|| {
                format!("there is no {c:?} on a US keyboard; expected characters of ASCII")
            })?;
            let key = |code, is_down| InputEvent::Key { code, is_down };
            if shift {
                events.push(key(keys::SHIFT, true));
            }
            events.extend([key(code, true), key(code, false)]);
            if shift {
                events.push(key(keys::SHIFT, false));
            }
            events.push(InputEvent::Gap);
        }
        Ok(events)
    }

    /// Holds keys down together and lets them go.
    pub fn chord(text: &str) -> Result<Vec<InputEvent>, String> {
        let keys = keys::of_chord(text)?;
        let down = keys.iter().map(|code| (*code, true));
        let up = keys.iter().rev().map(|code| (*code, false));
        let events = down
            .chain(up)
            .map(|(code, is_down)| InputEvent::Key { code, is_down });
        Ok(events.chain([InputEvent::Gap]).collect())
    }

    /// Holds input back (true) or lets it through.
    pub fn pause(&self, paused: bool) {
        lock(&self.0.queue).paused = paused;
        self.0.changed.notify_all();
    }

    /// Forgets what waits: the machine is reset.
    pub fn clear(&self) {
        lock(&self.0.queue).events.clear();
    }
}

/// A coordinate as a share of the screen's width or height, up to 7FFFH.
pub fn share(at: u32, size: u32) -> u16 {
    let last = u64::from(size.max(2)) - 1;
    let share = u64::from(at).min(last) * 0x7fff / last;
    u16::try_from(share).unwrap_or(0x7fff)
}

impl Shared {
    fn usb(&self) -> Option<Arc<Mutex<Xhci>>> {
        self.usb.as_ref().and_then(Weak::upgrade)
    }

    /// Tries the devices on USB: `None` if the guest uses none for this, else whether it was taken.
    fn to_usb(&self, event: &device::Input) -> Option<bool> {
        let usb = self.usb()?;
        let heard = lock(&usb).input(event);
        match heard {
            Heard::NotMine => None,
            Heard::Full => Some(false),
            Heard::On(_) => Some(true),
        }
    }

    fn deliver(&self, keyboard: &Weak<Mutex<I8042>>) {
        // Keys that went down on the PS/2 keyboard: they come up there.
        let mut held = BTreeSet::new();
        loop {
            let q = lock(&self.queue);
            let idle = |q: &mut Queue| (q.events.is_empty() || q.paused) && !q.closed;
            let q = self.changed.wait_while(q, idle);
            let q = q.unwrap_or_else(PoisonError::into_inner);
            let (Some(event), false) = (q.events.front().copied(), q.closed) else {
                return;
            };
            drop(q);
            let Some(device) = keyboard.upgrade() else {
                return;
            };
            let taken = match event {
                InputEvent::Key { code, is_down } => {
                    let usb = match held.contains(&code) && !is_down {
                        true => None,
                        false => self.to_usb(&device::Input::Key { code, is_down }),
                    };
                    usb.unwrap_or_else(|| {
                        let taken = lock(&device).key(code, is_down);
                        if taken && is_down {
                            held.insert(code);
                        } else if taken {
                            held.remove(&code);
                        }
                        taken
                    })
                }
                InputEvent::Pointer {
                    dx,
                    dy,
                    dz,
                    buttons,
                    at,
                } => {
                    let place = |(x, y)| device::Input::Pointer { x, y, dz, buttons };
                    at.and_then(|at| self.to_usb(&place(at)))
                        .unwrap_or_else(|| {
                            lock(&device).mouse(dx, dy, dz, buttons);
                            true
                        })
                }
                InputEvent::Gap => {
                    std::thread::sleep(TYPING_GAP);
                    true
                }
            };
            drop(device);
            if taken {
                let mut q = lock(&self.queue);
                // A reset may have emptied the queue meanwhile, and movement may have been added.
                match (q.events.front_mut(), event) {
                    (Some(f), _) if *f == event => {
                        q.events.pop_front();
                    }
                    (
                        Some(InputEvent::Pointer {
                            dx,
                            dy,
                            dz,
                            buttons,
                            ..
                        }),
                        InputEvent::Pointer {
                            dx: x,
                            dy: y,
                            dz: z,
                            buttons: b,
                            ..
                        },
                    ) if *buttons == b => {
                        *dx = dx.saturating_sub(x);
                        *dy = dy.saturating_sub(y);
                        *dz = dz.saturating_sub(z);
                    }
                    _ => {}
                }
            } else {
                std::thread::sleep(RETRY);
            }
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        // The thread holds one reference.
        if Arc::strong_count(&self.0) <= 2 {
            lock(&self.0.queue).closed = true;
            self.0.changed.notify_all();
        }
    }
}
