//! One client after the handshake: a thread that reads what it says, and one that sends what it
//! asked for.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyrite_devices::display::Surface;
use pyrite_vdev::bus::lock;

use super::Shared;
use super::handshake;
use super::messages::{Message, receive};
use super::pixels::PixelFormat;
use super::wire::{self, Receiver, Sender};
use super::zrle::Zrle;
use crate::display::input::{InputEvent, share};
use crate::display::keys::{self, KeyCode};
use crate::display::{FRAME, Generation, Rect, Shown};
use crate::listen::Stream;

const RAW: i32 = 0;
const ZRLE: i32 = 16;
const DESKTOP_SIZE: i32 = -223;
const EXTENDED_DESKTOP_SIZE: i32 = -308;
const POINTER_MOTION_CHANGE: i32 = -257;
const EXTENDED_KEY: i32 = -258;

/// How often a screen that has not changed for [`CALM`] is looked at.
const CALM_FRAME: Duration = Duration::from_millis(100);
const CALM: Duration = Duration::from_secs(2);
/// LIMIT: keys that a client holds.
const HELD_KEYS: usize = 32;
/// Relative pointer positions are sent around this.
const POINTER_CENTER: i32 = 0x7fff;
/// ExtendedDesktopSize: the server changed it; the client asked for it.
const REASON_SERVER: u16 = 0;
const REASON_CLIENT: u16 = 1;
/// ExtendedDesktopSize: the guest decides the size.
const STATUS_PROHIBITED: u16 = 1;

/// What a client wants, as far as the sending thread has to know.
struct Wants {
    format: PixelFormat,
    /// SetColourMapEntries is due.
    color_map: bool,
    zrle: bool,
    desktop_size: bool,
    extended_size: bool,
    /// Extended keys are to be offered.
    offer_keys: bool,
    /// It can be told whether the pointer is relative.
    motion: bool,
    /// Told that the pointer is relative, or that it is not.
    relative_pointer: Option<bool>,
    /// The size is to be told, with this reason and status.
    tell_size: Option<(u16, u16)>,
    /// An update is asked for.
    asked: bool,
    /// All of this is to be sent, changed or not.
    whole: Option<Rect>,
    closed: bool,
}

struct Session {
    wants: Mutex<Wants>,
    changed: Condvar,
}

/// Serves one client to its end.
pub(super) fn run(shared: &Arc<Shared>, stream: Stream) -> io::Result<()> {
    let (mut from, to) = wire::open(stream, shared.password.is_some())?;
    let size = shared
        .screen
        .look(FRAME, |s| (s.surface().width(), s.surface().height()));
    let password = shared.password.as_ref();
    handshake::open(&mut from, &to, password, &shared.name, size)?;
    from.set_patient()?;
    let session = Arc::new(Session {
        wants: Mutex::new(Wants {
            format: PixelFormat::NATIVE,
            color_map: false,
            zrle: false,
            desktop_size: false,
            extended_size: false,
            offer_keys: false,
            motion: false,
            relative_pointer: None,
            tell_size: None,
            asked: false,
            whole: None,
            closed: false,
        }),
        changed: Condvar::new(),
    });
    let writer = {
        let (session, shared, to) = (Arc::clone(&session), Arc::clone(shared), to.clone());
        std::thread::Builder::new()
            .name("vnc-send".into())
            .spawn(move || {
                let done = session.send_updates(&shared, &to, size);
                if let Err(e) = done {
                    tracing::info!("VNC: {e}");
                }
                // The reading thread ends by this.
                to.close();
            })?
    };
    let mut hands = Hands::default();
    let done = session.hear(shared, &mut from, &mut hands);
    hands.let_go(shared);
    lock(&session.wants).closed = true;
    session.changed.notify_all();
    to.close();
    let _ = writer.join();
    match done {
        // The client went away.
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        other => other,
    }
}

/// What a client holds down.
#[derive(Default)]
struct Hands {
    keys: BTreeSet<KeyCode>,
    /// Buttons of the protocol.
    buttons: u8,
    pointer: Option<(i32, i32)>,
    /// Where the pointer is, as a share of the screen.
    place: Option<(u16, u16)>,
}

impl Hands {
    fn key(&mut self, shared: &Shared, code: KeyCode, is_down: bool) {
        if is_down {
            // LIMIT: HELD_KEYS.
            if self.keys.len() >= HELD_KEYS && !self.keys.contains(&code) {
                return;
            }
            self.keys.insert(code);
        } else {
            self.keys.remove(&code);
        }
        // What finds no room is lost, as on a keyboard whose buffer is full.
        shared.input.send(&[InputEvent::Key { code, is_down }]);
    }

    fn pointer(&mut self, shared: &Shared, buttons: u8, at: (i32, i32), relative: bool) {
        let (dx, dy) = if relative {
            (at.0 - POINTER_CENTER, at.1 - POINTER_CENTER)
        } else {
            let from = self.pointer.replace(at).unwrap_or(at);
            (at.0 - from.0, at.1 - from.1)
        };
        // Wheel notches are presses of buttons 4 and 5.
        let pressed = buttons & !self.buttons;
        self.buttons = buttons;
        let dz = i32::from(pressed >> 4 & 1) - i32::from(pressed >> 3 & 1);
        let held = buttons & 1 | (buttons & 2) << 1 | (buttons & 4) >> 1;
        let size = shared.screen.look(Duration::MAX, |s| {
            (s.surface().width(), s.surface().height())
        });
        let (x, y) = (at.0.unsigned_abs(), at.1.unsigned_abs());
        self.place = (!relative).then(|| (share(x, size.0), share(y, size.1)));
        shared.input.send(&[InputEvent::Pointer {
            dx,
            dy,
            dz,
            buttons: held,
            at: self.place,
        }]);
    }

    /// A client that is gone holds nothing.
    fn let_go(&mut self, shared: &Shared) {
        for code in std::mem::take(&mut self.keys) {
            let is_down = false;
            shared.input.send(&[InputEvent::Key { code, is_down }]);
        }
        if std::mem::take(&mut self.buttons) != 0 {
            shared.input.send(&[InputEvent::Pointer {
                dx: 0,
                dy: 0,
                dz: 0,
                buttons: 0,
                at: self.place,
            }]);
        }
    }
}

impl Session {
    fn hear(&self, shared: &Shared, from: &mut Receiver, hands: &mut Hands) -> io::Result<()> {
        loop {
            let message = receive(from)?;
            let mut w = lock(&self.wants);
            if w.closed {
                return Ok(());
            }
            match message {
                Message::SetPixelFormat(format) => {
                    w.format = format;
                    w.color_map = format.color_map().is_some();
                }
                Message::SetEncodings(encodings) => w.set_encodings(&encodings),
                Message::UpdateRequest { incremental, area } => {
                    let [x, y, width, height] = area.map(u32::from);
                    w.asked = true;
                    if !incremental {
                        w.whole = Some(union(
                            w.whole,
                            Rect {
                                x,
                                y,
                                width,
                                height,
                            },
                        ));
                    }
                    self.changed.notify_all();
                }
                Message::SetDesktopSize => {
                    w.tell_size = Some((REASON_CLIENT, STATUS_PROHIBITED));
                    self.changed.notify_all();
                }
                Message::Key {
                    is_down,
                    keysym,
                    number,
                } => {
                    drop(w);
                    let by_number = number.and_then(keys::of_xt);
                    if let Some(code) = by_number.or_else(|| keys::of_keysym(keysym)) {
                        hands.key(shared, code, is_down);
                    }
                }
                Message::Pointer { buttons, x, y } => {
                    let relative = w.relative_pointer == Some(true);
                    drop(w);
                    hands.pointer(shared, buttons, (x.into(), y.into()), relative);
                }
                Message::Other => {}
            }
        }
    }

    /// Sends updates, each when it was asked for and there is something to tell.
    fn send_updates(&self, shared: &Shared, to: &Sender, size: (u32, u32)) -> io::Result<()> {
        let mut view = View {
            seen: 0,
            size,
            zrle: Zrle::new(),
        };
        let mut last_change = Instant::now();
        let mut out = Vec::new();
        loop {
            let age = {
                let w = lock(&self.wants);
                let waits = |w: &mut Wants| !w.closed && !w.asked && w.tell_size.is_none();
                let w = self.changed.wait_while(w, waits);
                let w = w.unwrap_or_else(PoisonError::into_inner);
                if w.closed {
                    return Ok(());
                }
                // Who asks for all of it wants to see it as it is now.
                match w.whole {
                    Some(_) => Duration::ZERO,
                    None => FRAME,
                }
            };
            let relative = !shared.input.wants_place();
            let pieces = shared.screen.look(age, |shown| {
                let mut w = lock(&self.wants);
                view.collect(&mut w, shown, relative)
            });
            let Some(pieces) = pieces else {
                let pause = if last_change.elapsed() > CALM {
                    CALM_FRAME
                } else {
                    FRAME
                };
                // Another wish, such as all of the screen, ends the pause.
                let w = lock(&self.wants);
                let waits = |w: &mut Wants| !w.closed && w.whole.is_none();
                drop(self.changed.wait_timeout_while(w, pause, waits));
                continue;
            };
            last_change = Instant::now();
            out.clear();
            view.encode(pieces, &mut out)?;
            to.send(&out)?;
        }
    }
}

fn union(a: Option<Rect>, b: Rect) -> Rect {
    let Some(a) = a else { return b };
    let (x, y) = (a.x.min(b.x), a.y.min(b.y));
    Rect {
        x,
        y,
        width: (a.x + a.width).max(b.x + b.width) - x,
        height: (a.y + a.height).max(b.y + b.height) - y,
    }
}

impl Wants {
    fn set_encodings(&mut self, encodings: &[i32]) {
        // The first pixel encoding that we know; raw is always allowed.
        let first = encodings.iter().find(|e| [RAW, ZRLE].contains(e));
        self.zrle = first == Some(&ZRLE);
        self.desktop_size = encodings.contains(&DESKTOP_SIZE);
        let extended = encodings.contains(&EXTENDED_DESKTOP_SIZE);
        if extended && !self.extended_size {
            // "The server must send an ExtendedDesktopSize rectangle" to say that it knows it.
            self.tell_size = Some((REASON_SERVER, 0));
        }
        self.extended_size = extended;
        self.offer_keys |= encodings.contains(&EXTENDED_KEY);
        self.motion = encodings.contains(&POINTER_MOTION_CHANGE);
        self.relative_pointer = self.relative_pointer.filter(|_| self.motion);
    }
}

/// One rectangle to be sent.
enum Piece {
    Pixels(Rect, Vec<u32>),
    /// Encoding and position of a rectangle without pixels.
    Note(i32, u16, u16),
    /// Size of the screen, with reason and status; extended or not.
    Size(bool, u16, u16, (u32, u32)),
}

/// An update: what is needed to encode it without the screen.
struct Update {
    format: PixelFormat,
    color_map: bool,
    zrle: bool,
    pieces: Vec<Piece>,
}

/// What the client has been sent.
struct View {
    seen: Generation,
    size: (u32, u32),
    zrle: Zrle,
}

impl View {
    /// What to send now, if anything; the wishes that it fulfils are taken away.
    /// `relative`: the guest takes movements of the pointer, not places.
    fn collect(&mut self, w: &mut Wants, shown: &Shown, relative: bool) -> Option<Update> {
        let size = (shown.surface().width(), shown.surface().height());
        let mut pieces = Vec::new();
        if let Some((reason, status)) = w.tell_size.take()
            && w.extended_size
        {
            pieces.push(Piece::Size(true, reason, status, size));
        }
        if size != self.size && (w.extended_size || w.desktop_size) {
            self.size = size;
            if pieces.is_empty() {
                pieces.push(Piece::Size(w.extended_size, REASON_SERVER, 0, size));
            }
            // The whole new screen follows with the next update.
            self.seen = 0;
        }
        if pieces.is_empty() && w.asked {
            let mut rects = shown.changes_since(self.seen);
            if let Some(whole) = w.whole.take() {
                rects.retain(|r| !contains(whole, *r));
                rects.push(whole);
            }
            let rects = rects
                .into_iter()
                .filter_map(|r| clip(clip(r, size)?, self.size));
            pieces.extend(rects.map(|r| Piece::Pixels(r, copy(shown.surface(), r))));
            self.seen = shown.generation();
        }
        if w.asked || !pieces.is_empty() {
            if std::mem::take(&mut w.offer_keys) {
                pieces.push(Piece::Note(EXTENDED_KEY, 0, 0));
            }
            if w.motion && w.relative_pointer != Some(relative) {
                w.relative_pointer = Some(relative);
                // Position 0 of this one means relative.
                pieces.push(Piece::Note(POINTER_MOTION_CHANGE, (!relative).into(), 0));
            }
        }
        if pieces.is_empty() {
            return None;
        }
        w.asked = false;
        Some(Update {
            format: w.format,
            color_map: std::mem::take(&mut w.color_map),
            zrle: w.zrle,
            pieces,
        })
    }

    /// FramebufferUpdate, RFC 6143 §7.6.1.
    fn encode(&mut self, update: Update, out: &mut Vec<u8>) -> io::Result<()> {
        let Update {
            format,
            color_map,
            zrle,
            pieces,
        } = update;
        if let Some(map) = format.color_map().filter(|_| color_map) {
            out.extend(map);
        }
        out.extend([0, 0]);
        // LIMIT: a screen of the largest size has fewer tiles than fit.
        out.extend((pieces.len() as u16).to_be_bytes());
        let head = |out: &mut Vec<u8>, r: [u16; 4], encoding: i32| {
            r.iter().for_each(|v| out.extend(v.to_be_bytes()));
            out.extend(encoding.to_be_bytes());
        };
        for piece in pieces {
            match piece {
                Piece::Pixels(r, pixels) => {
                    let at = [r.x, r.y, r.width, r.height].map(|v| v as u16);
                    if zrle {
                        head(out, at, ZRLE);
                        self.zrle.encode(&pixels, r.width as usize, format, out)?;
                    } else {
                        head(out, at, RAW);
                        pixels.iter().for_each(|p| format.put(*p, out));
                    }
                }
                Piece::Note(encoding, x, y) => head(out, [x, y, 0, 0], encoding),
                Piece::Size(extended, reason, status, (width, height)) => {
                    let size = [width as u16, height as u16];
                    if extended {
                        head(
                            out,
                            [reason, status, size[0], size[1]],
                            EXTENDED_DESKTOP_SIZE,
                        );
                        // One screen, with id 0 at 0, 0 and without flags.
                        out.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
                        size.iter().for_each(|v| out.extend(v.to_be_bytes()));
                        out.extend([0; 4]);
                    } else {
                        head(out, [0, 0, size[0], size[1]], DESKTOP_SIZE);
                    }
                }
            }
        }
        Ok(())
    }
}

fn contains(outer: Rect, r: Rect) -> bool {
    r.x >= outer.x
        && r.y >= outer.y
        && r.x + r.width <= outer.x + outer.width
        && r.y + r.height <= outer.y + outer.height
}

/// The part of a rectangle inside a screen of this size.
fn clip(r: Rect, size: (u32, u32)) -> Option<Rect> {
    let width = (r.x + r.width).min(size.0).checked_sub(r.x)?;
    let height = (r.y + r.height).min(size.1).checked_sub(r.y)?;
    (width > 0 && height > 0).then_some(Rect { width, height, ..r })
}

fn copy(surface: &Surface, r: Rect) -> Vec<u32> {
    let columns = r.x as usize..(r.x + r.width) as usize;
    (r.y..r.y + r.height)
        .flat_map(|y| surface.line(y).get(columns.clone()).unwrap_or_default())
        .copied()
        .collect()
}
