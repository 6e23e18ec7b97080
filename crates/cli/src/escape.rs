//! The escape key: `Ctrl-A` and one more key are for Pyrite, everything else is for the guest.

/// `Ctrl-A`.
pub const ESCAPE: u8 = 0x01;

/// What the screen shows for `Ctrl-A h`.
pub const HELP: &str = "\
Ctrl-A h       this help
Ctrl-A x       quit: end the VM at once
Ctrl-A b       send a break
Ctrl-A r       reset the machine
Ctrl-A p       press the power button
Ctrl-A i       show what the machine is and does
Ctrl-A Ctrl-A  send Ctrl-A
";

/// A piece of what was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// For the guest.
    Bytes(Vec<u8>),
    /// Show the help.
    Help,
    /// End the VM.
    Quit,
    /// Send a break.
    Break,
    /// Reset the machine.
    Reset,
    /// Press the power button.
    PowerButton,
    /// Show the machine.
    Inspect,
}

/// Finds escape sequences in a stream that arrives in pieces.
#[derive(Debug, Default)]
pub struct EscapeKey {
    pending: bool,
}

impl EscapeKey {
    /// Splits the next piece of input.
    pub fn feed(&mut self, input: &[u8]) -> Vec<Typed> {
        let mut out = Vec::new();
        let mut plain = Vec::new();
        for &byte in input {
            if !std::mem::take(&mut self.pending) {
                match byte {
                    ESCAPE => self.pending = true,
                    b => plain.push(b),
                }
                continue;
            }
            let command = match byte {
                ESCAPE | b'a' => {
                    plain.push(ESCAPE);
                    continue;
                }
                b'x' | b'X' => Typed::Quit,
                b'b' | b'B' => Typed::Break,
                b'r' | b'R' => Typed::Reset,
                b'p' | b'P' => Typed::PowerButton,
                b'i' | b'I' => Typed::Inspect,
                // An unknown key shows what there is.
                _ => Typed::Help,
            };
            if !plain.is_empty() {
                out.push(Typed::Bytes(std::mem::take(&mut plain)));
            }
            out.push(command);
        }
        if !plain.is_empty() {
            out.push(Typed::Bytes(plain));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(b: &[u8]) -> Typed {
        Typed::Bytes(b.to_vec())
    }

    #[test]
    fn plain_input_passes() {
        assert_eq!(EscapeKey::default().feed(b"ls\r\x03"), [bytes(b"ls\r\x03")]);
    }

    #[test]
    fn commands_are_taken_out() {
        let mut k = EscapeKey::default();
        let got = k.feed(b"a\x01bc\x01x\x01r\x01p\x01h");
        let want = [
            bytes(b"a"),
            Typed::Break,
            bytes(b"c"),
            Typed::Quit,
            Typed::Reset,
            Typed::PowerButton,
            Typed::Help,
        ];
        assert_eq!(got, want);
    }

    #[test]
    fn escape_split_over_two_reads_still_counts() {
        let mut k = EscapeKey::default();
        assert_eq!(k.feed(b"a\x01"), [bytes(b"a")]);
        assert_eq!(k.feed(b"x"), [Typed::Quit]);
    }

    #[test]
    fn escape_twice_sends_itself() {
        assert_eq!(EscapeKey::default().feed(b"1\x01\x012"), [bytes(b"1\x012")]);
    }
}
