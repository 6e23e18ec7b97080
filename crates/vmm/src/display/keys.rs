//! Keys by name, by character on a US keyboard, and by X11 keysym.
//!
//! A key is named by its make code of scan code set 1; extended keys are E0xxH, Pause is E11DH.

/// A key: see the module.
pub type KeyCode = u16;

/// The left shift key.
pub const SHIFT: KeyCode = 0x2a;
/// Pause, which has no break code.
pub const PAUSE: KeyCode = 0xe11d;
const PRINT: KeyCode = 0xe037;

/// Keys that make characters: their first code, characters without and with shift.
const CHARACTERS: [(KeyCode, &str, &str); 6] = [
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1e, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (0x2b, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    (0x39, " ", " "),
    // The extra key of European keyboards.
    (0x56, "<", ">"),
];

/// Keys with a name: code, X11 keysym (0 = none), names.
#[rustfmt::skip]
const NAMED: [(KeyCode, u32, &[&str]); 92] = [
    (0x01, 0xff1b, &["esc", "escape"]),
    (0x0e, 0xff08, &["backspace"]),
    (0x0f, 0xff09, &["tab"]),
    (0x0f, 0xfe20, &[]),
    (0x1c, 0xff0d, &["enter", "return", "ret"]),
    (0x1d, 0xffe3, &["ctrl", "control", "ctrl_l"]),
    (0xe01d, 0xffe4, &["ctrl_r"]),
    (0x2a, 0xffe1, &["shift", "shift_l"]),
    (0x36, 0xffe2, &["shift_r"]),
    (0x38, 0xffe9, &["alt", "alt_l"]),
    (0x38, 0xffe7, &[]),
    (0xe038, 0xffea, &["alt_r", "altgr"]),
    (0xe038, 0xffe8, &[]),
    (0xe038, 0xfe03, &[]),
    (0xe038, 0xff7e, &[]),
    (0xe05b, 0xffeb, &["meta", "meta_l", "super", "win"]),
    (0xe05c, 0xffec, &["meta_r", "super_r"]),
    (0xe05d, 0xff67, &["menu"]),
    (0x39, 0, &["space", "spc"]),
    (0x0c, 0, &["minus"]),
    (0x3a, 0xffe5, &["caps_lock", "capslock"]),
    (0x45, 0xff7f, &["num_lock", "numlock"]),
    (0x46, 0xff14, &["scroll_lock", "scrolllock"]),
    (PRINT, 0xff61, &["print", "sysrq"]),
    (PRINT, 0xff15, &[]),
    (PAUSE, 0xff13, &["pause"]),
    (PAUSE, 0xff6b, &["break"]),
    (0x3b, 0xffbe, &["f1"]),
    (0x3c, 0xffbf, &["f2"]),
    (0x3d, 0xffc0, &["f3"]),
    (0x3e, 0xffc1, &["f4"]),
    (0x3f, 0xffc2, &["f5"]),
    (0x40, 0xffc3, &["f6"]),
    (0x41, 0xffc4, &["f7"]),
    (0x42, 0xffc5, &["f8"]),
    (0x43, 0xffc6, &["f9"]),
    (0x44, 0xffc7, &["f10"]),
    (0x57, 0xffc8, &["f11"]),
    (0x58, 0xffc9, &["f12"]),
    (0xe052, 0xff63, &["insert", "ins"]),
    (0xe053, 0xffff, &["delete", "del"]),
    (0xe047, 0xff50, &["home"]),
    (0xe04f, 0xff57, &["end"]),
    (0xe049, 0xff55, &["pgup", "page_up", "pageup"]),
    (0xe051, 0xff56, &["pgdn", "page_down", "pagedown"]),
    (0xe04b, 0xff51, &["left"]),
    (0xe048, 0xff52, &["up"]),
    (0xe04d, 0xff53, &["right"]),
    (0xe050, 0xff54, &["down"]),
    (0xe01c, 0xff8d, &["kp_enter"]),
    (0xe035, 0xffaf, &["kp_divide"]),
    (0x37, 0xffaa, &["kp_multiply"]),
    (0x4a, 0xffad, &["kp_subtract"]),
    (0x4e, 0xffab, &["kp_add"]),
    (0x53, 0xffae, &["kp_decimal"]),
    (0x53, 0xffac, &[]),
    (0x53, 0xff9f, &[]),
    (0x52, 0xffb0, &["kp_0"]),
    (0x52, 0xff9e, &[]),
    (0x4f, 0xffb1, &["kp_1"]),
    (0x4f, 0xff9c, &[]),
    (0x50, 0xffb2, &["kp_2"]),
    (0x50, 0xff99, &[]),
    (0x51, 0xffb3, &["kp_3"]),
    (0x51, 0xff9b, &[]),
    (0x4b, 0xffb4, &["kp_4"]),
    (0x4b, 0xff96, &[]),
    (0x4c, 0xffb5, &["kp_5"]),
    (0x4c, 0xff9d, &[]),
    (0x4d, 0xffb6, &["kp_6"]),
    (0x4d, 0xff98, &[]),
    (0x47, 0xffb7, &["kp_7"]),
    (0x47, 0xff95, &[]),
    (0x48, 0xffb8, &["kp_8"]),
    (0x48, 0xff97, &[]),
    (0x49, 0xffb9, &["kp_9"]),
    (0x49, 0xff9a, &[]),
    (0x59, 0xffbd, &["kp_equal"]),
    (0xe020, 0x1008_ff12, &["mute"]),
    (0xe02e, 0x1008_ff11, &["volumedown"]),
    (0xe030, 0x1008_ff13, &["volumeup"]),
    (0xe05e, 0x1008_ff2a, &["power"]),
    (0xe05f, 0x1008_ff2f, &["sleep"]),
    (0xe063, 0x1008_ff2b, &["wake"]),
    (0x73, 0, &["ro"]),
    (0x70, 0xff27, &["katakanahiragana"]),
    (0x79, 0xff23, &["henkan"]),
    (0x7b, 0xff22, &["muhenkan"]),
    (0x7d, 0xa5, &["yen"]),
    (0x56, 0, &["less"]),
    (0x33, 0, &["comma"]),
    (0x34, 0, &["dot"]),
];

/// The key for a character of a US keyboard, and whether shift is held.
pub fn of_char(c: char) -> Option<(KeyCode, bool)> {
    match c {
        '\n' | '\r' => return Some((0x1c, false)),
        '\t' => return Some((0x0f, false)),
        '\x08' | '\x7f' => return Some((0x0e, false)),
        '\x1b' => return Some((0x01, false)),
        _ => {}
    }
    CHARACTERS.iter().find_map(|(first, plain, shifted)| {
        let at = |s: &str| s.chars().position(|k| k == c);
        let (n, shift) = match (at(plain), at(shifted)) {
            (Some(n), _) => (n, false),
            (None, Some(n)) => (n, true),
            _ => return None,
        };
        Some((first + n as KeyCode, shift))
    })
}

/// The key with this name: one of the list above, or a character.
pub fn of_name(name: &str) -> Option<KeyCode> {
    let lower = name.to_ascii_lowercase();
    let named = NAMED
        .iter()
        .find(|(.., names)| names.contains(&lower.as_str()));
    if let Some((code, ..)) = named {
        return Some(*code);
    }
    let mut chars = name.chars();
    let (c, rest) = (chars.next()?, chars.next());
    rest.is_none().then(|| of_char(c).map(|(code, _)| code))?
}

/// The keys of a chord such as `ctrl-alt-delete`, in order. Says what is wrong otherwise.
pub fn of_chord(text: &str) -> Result<Vec<KeyCode>, String> {
    // LIMIT: keys held together.
    const MOST: usize = 8;
    // A minus sign is a key too: "ctrl--".
    let (front, last) = match text.strip_suffix("--") {
        Some(front) => (front, Some("-")),
        None if text == "-" => ("", Some("-")),
        None => (text, None),
    };
    let names = front.split('-').filter(|_| !front.is_empty()).chain(last);
    let mut keys = Vec::new();
    for name in names {
        let key = of_name(name).ok_or_else(|| {
            format!(
                "there is no key {name:?}; expected keys such as ctrl, alt, shift, delete, f1, \
                 enter, kp_7 or a character, joined by -"
            )
        })?;
        keys.push(key);
    }
    if keys.is_empty() || keys.len() > MOST {
        return Err(format!(
            "{text:?} has {} keys; expected 1 to {MOST}, joined by -",
            keys.len()
        ));
    }
    Ok(keys)
}

/// The key that makes an X11 keysym on a US keyboard. Shift is a key of its own.
pub fn of_keysym(keysym: u32) -> Option<KeyCode> {
    // Latin-1 keysyms are their characters.
    if let Some(c) = char::from_u32(keysym).filter(|c| (' '..='~').contains(c)) {
        return of_char(c).map(|(code, _)| code);
    }
    let found = NAMED.iter().find(|(_, k, _)| *k == keysym && keysym != 0);
    found.map(|(code, ..)| *code)
}

/// The key of an XT key number as the extended key event of QEMU has it: bit 7 stands for the
/// prefix E0H. RFB protocol, "QEMU Extended Key Event Message".
pub fn of_xt(number: u32) -> Option<KeyCode> {
    match number {
        0xc6 => Some(PAUSE),
        0x54 => Some(PRINT),
        1..=0x7f => Some(number as KeyCode),
        0x81..=0xff => Some(0xe000 | (number & 0x7f) as KeyCode),
        _ => None,
    }
}
