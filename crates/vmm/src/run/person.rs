//! What a person does with the screen, the keyboard and the pointer through the control socket.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use pyrite_api::control::{MAX_STROKES, MAX_TEXT_CHARS, Stroke};

use super::Running;
use crate::display::input::{self, Input};

impl Running {
    /// Writes what the screen shows to a file.
    pub(super) fn screenshot(&self, path: &std::path::Path) -> Result<()> {
        let Some((screen, _)) = &self.d.machine.screen else {
            bail!("this VM has no screen; start it with --vga std");
        };
        let png = screen.screenshot()?;
        std::fs::write(path, png).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Types on the guest's keyboard.
    pub(super) fn keys(&self, strokes: &[Stroke]) -> Result<()> {
        if strokes.len() > MAX_STROKES {
            bail!("{} strokes; at most {MAX_STROKES}", strokes.len());
        }
        let mut events = Vec::new();
        for s in strokes {
            let more = match s {
                Stroke::Text(t) if t.chars().count() > MAX_TEXT_CHARS => {
                    bail!("a text of more than {MAX_TEXT_CHARS} characters; type it in parts")
                }
                Stroke::Text(t) => Input::text(t),
                Stroke::Chord(keys) => Input::chord(keys),
            };
            events.extend(more.map_err(anyhow::Error::msg)?);
        }
        if !self.d.machine.input.send(&events) {
            bail!("the guest has not yet taken what was typed before; try again later");
        }
        Ok(())
    }

    /// Moves the tablet's pointer to a dot of the screen.
    pub(super) fn point(&self, (x, y): (u32, u32), buttons: u8, wheel: i32) -> Result<()> {
        let m = &self.d.machine;
        let Some((screen, _)) = &m.screen else {
            bail!("this VM has no screen; start it with --vga std");
        };
        let (width, height) = screen.look(Duration::ZERO, |s| {
            (s.surface().width(), s.surface().height())
        });
        if x >= width || y >= height {
            bail!("the screen has {width} x {height} dots; expected a place on it");
        }
        if !m.input.wants_place() {
            bail!(
                "the guest uses no tablet; start the VM with --usb tablet, and wait until the guest \
                 has its driver"
            );
        }
        let at = (input::share(x, width), input::share(y, height));
        if !m.input.send(&Input::point(at, buttons, wheel)) {
            bail!("the guest has not yet taken what was typed before; try again later");
        }
        Ok(())
    }
}
