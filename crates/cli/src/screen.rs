//! The screen, keyboard and pointer of a VM: options of `pyrite run`, and the commands `screenshot`,
//! `type`, `key` and `mouse`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use pyrite_api::control::{Command, MAX_STROKES, MAX_TEXT_CHARS, Stroke};
use pyrite_api::v1::{ScreenSpec, VgaKind, VncSpec};

/// Options of `pyrite run` about the screen.
#[derive(Debug, Args)]
pub struct ScreenArgs {
    /// Screen: std or none [default: std with --vnc, else none]
    ///
    /// The video BIOS is that of the host's package seabios unless rom=FILE names another one.
    #[arg(long, value_name = "std|none[,rom=FILE]", value_parser = parse_vga)]
    vga: Option<(VgaKind, Option<PathBuf>)>,
    /// Serve the screen by VNC
    ///
    /// On a Unix socket that only its owner can connect to, or a port of the host's loopback. The
    /// first line of password-file is what clients are asked for; VNC passwords have 8 characters.
    #[arg(
        long,
        value_name = "unix:PATH|127.0.0.1:PORT[,password-file=FILE]",
        value_parser = parse_vnc
    )]
    vnc: Option<VncSpec>,
}

impl ScreenArgs {
    /// The screen that they describe.
    pub fn spec(&self) -> ScreenSpec {
        let default = match self.vnc {
            Some(_) => VgaKind::Std,
            None => VgaKind::None,
        };
        let (vga, vga_rom) = self.vga.clone().unwrap_or((default, None));
        ScreenSpec {
            vga,
            vga_rom,
            vnc: self.vnc.clone(),
        }
    }
}

fn parse_vga(text: &str) -> Result<(VgaKind, Option<PathBuf>), String> {
    let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
    let kind = match kind {
        "std" => VgaKind::Std,
        "none" => VgaKind::None,
        _ => return Err("expected std or none".into()),
    };
    match rest.split_once('=') {
        None if rest.is_empty() => Ok((kind, None)),
        Some(("rom", file)) if !file.is_empty() => Ok((kind, Some(file.into()))),
        _ => Err(format!("unknown setting {rest:?}; expected rom=FILE")),
    }
}

fn parse_vnc(text: &str) -> Result<VncSpec, String> {
    let (listen, password_file) = match text.split_once(",password-file=") {
        Some((l, f)) if !f.is_empty() => (l, Some(f.into())),
        Some(_) => return Err("password-file= needs a file".into()),
        None => (text, None),
    };
    let listen = crate::listen::parse(listen, ",password-file=FILE")?;
    Ok(VncSpec {
        listen,
        password_file,
    })
}

/// Options of `pyrite screenshot`.
#[derive(Debug, Args)]
pub struct ScreenshotArgs {
    /// The socket that the VM was given with --control
    socket: PathBuf,
    /// PNG file to write; it is replaced
    file: PathBuf,
}

/// Options of `pyrite type`.
#[derive(Debug, Args)]
pub struct TypeArgs {
    /// The socket that the VM was given with --control
    socket: PathBuf,
    /// Characters of a US keyboard; \\n is the enter key, \\t the tab key
    text: String,
}

/// Options of `pyrite key`.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// The socket that the VM was given with --control
    socket: PathBuf,
    /// Keys, one chord after the other: ctrl-alt-delete, f2, shift-a, enter
    #[arg(required = true, value_name = "KEY[-KEY...]")]
    keys: Vec<String>,
}

/// Buttons by name.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Button {
    Left,
    Right,
    Middle,
}

/// Options of `pyrite mouse`.
#[derive(Debug, Args)]
pub struct MouseArgs {
    /// The socket that the VM was given with --control
    socket: PathBuf,
    /// Dots from the left edge of the screen, as in a screenshot
    x: u32,
    /// Dots from its upper edge
    y: u32,
    /// Press a button there, and let it go
    #[arg(long, value_enum)]
    click: Option<Button>,
    /// Turn the wheel there by so many notches: down, or up if negative
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-100..=100)
    )]
    wheel: i32,
}

/// `pyrite mouse`.
pub fn mouse(args: &MouseArgs) -> u8 {
    let command = Command::Point {
        x: args.x,
        y: args.y,
        buttons: match args.click {
            None => 0,
            Some(Button::Left) => 1,
            Some(Button::Right) => 2,
            Some(Button::Middle) => 4,
        },
        wheel: args.wheel,
    };
    crate::ctl::finish(crate::ctl::request(&args.socket, command))
}

/// `pyrite screenshot`.
pub fn screenshot(args: &ScreenshotArgs) -> u8 {
    // The VM process has a working directory of its own.
    let path = std::path::absolute(&args.file).context("the path of the picture");
    crate::ctl::finish(
        path.and_then(|path| crate::ctl::request(&args.socket, Command::Screenshot { path })),
    )
}

/// `pyrite type`.
pub fn type_text(args: &TypeArgs) -> u8 {
    let text: Vec<char> = unescape(&args.text).chars().collect();
    for part in text.chunks(MAX_TEXT_CHARS) {
        let strokes = vec![Stroke::Text(part.iter().collect())];
        let code = crate::ctl::finish(crate::ctl::request(&args.socket, Command::Keys { strokes }));
        if code != 0 {
            return code;
        }
    }
    0
}

/// `pyrite key`.
pub fn key(args: &KeyArgs) -> u8 {
    for part in args.keys.chunks(MAX_STROKES) {
        let strokes = part.iter().cloned().map(Stroke::Chord).collect();
        let code = crate::ctl::finish(crate::ctl::request(&args.socket, Command::Keys { strokes }));
        if code != 0 {
            return code;
        }
    }
    0
}

/// `\n`, `\t`, `\e` and `\\` as the characters that they mean.
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('n') => out.push('\n'),
            Some('t') => out.push('\t'),
            Some('e') => out.push('\x1b'),
            Some('\\') => out.push('\\'),
            Some(other) => out.extend(['\\', other]),
            None => out.push('\\'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use pyrite_api::v1::Listen;

    use super::*;

    #[test]
    fn vnc_addresses_are_understood() {
        let unix = parse_vnc("unix:/run/a,b,password-file=/p").unwrap();
        assert_eq!(unix.listen, Listen::Unix("/run/a,b".into()));
        assert_eq!(unix.password_file, Some("/p".into()));
        let tcp = parse_vnc("127.0.0.1:5900").unwrap();
        assert_eq!(tcp.listen, Listen::Tcp("127.0.0.1:5900".parse().unwrap()));
        for wrong in [
            "",
            "5900",
            "unix:",
            "localhost:5900",
            "127.0.0.1:1,password-file=",
        ] {
            assert!(parse_vnc(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_vga("std,rom=a=b").unwrap().1, Some("a=b".into()));
        assert!(parse_vga("std,").is_ok() && parse_vga("vga").is_err());
        assert!(parse_vga("std,rom=").is_err());
    }

    #[test]
    fn escapes_are_characters() {
        assert_eq!(unescape(r"a\n\t\\n\q\"), "a\n\t\\n\\q\\");
    }
}
