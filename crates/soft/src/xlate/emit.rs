//! The emitter: a growing buffer of host code with labels, and the few fixed instruction forms
//! that the engine adds around copied guest instructions.
//!
//! Register arguments are host register numbers (0-15). Encodings: Intel SDM Vol. 2A §2.1-2.3.

use iced_x86::{Encoder, Instruction};

/// Host scratch register: an address, then the offset in its page.
pub const T0: u8 = 10;
/// Host scratch register: a soft-TLB slot, then the page's host address.
pub const T1: u8 = 11;
const RSP: u8 = 4;

/// What a constant in emitted code depends on besides the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Depends {
    /// 64 bits: the block's RIP plus something.
    Rip,
    /// 64 bits: something less the block's RIP.
    NegRip,
    /// 32 bits: the block's index.
    Id,
    /// 32 bits: the offset of the code-TLB slot of the block's page.
    CodeSlot,
    /// 32 bits: the low half of a host address in the block.
    Host,
}

/// Where such a constant is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reloc {
    /// Offset of the constant from the block's first byte.
    pub at: u16,
    /// What it is.
    pub depends: Depends,
}

/// A position in the code that jumps may name before it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// See the module documentation.
pub struct Emitter {
    code: Vec<u8>,
    enc: Encoder,
    base: u64,
    labels: Vec<Option<usize>>,
    fixups: Vec<(usize, Label)>,
    /// Constants that change when the block is wanted at another RIP.
    pub relocs: Vec<Reloc>,
    /// The block cannot serve another RIP by changing those.
    pub fixed: bool,
}

/// One encoded instruction.
#[derive(Clone, Copy, Debug)]
pub struct Encoded {
    bytes: [u8; 16],
    len: usize,
}

/// An address as LEA takes it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Address {
    /// Base register.
    pub base: Option<u8>,
    /// Index register and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// Displacement.
    pub disp: i32,
}

impl Emitter {
    /// An empty buffer.
    pub fn new() -> Emitter {
        Emitter {
            code: Vec::with_capacity(4096),
            enc: Encoder::new(64),
            base: 0,
            labels: Vec::new(),
            fixups: Vec::new(),
            relocs: Vec::new(),
            fixed: false,
        }
    }

    /// Empties the buffer; its first byte will execute at `base`.
    pub fn restart(&mut self, base: u64) {
        self.code.clear();
        self.labels.clear();
        self.fixups.clear();
        self.relocs.clear();
        self.fixed = false;
        self.base = base;
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.code.len()
    }

    /// Address at which the next byte will execute.
    pub fn address(&self) -> u64 {
        self.base.wrapping_add(self.code.len() as u64)
    }

    /// A label to be bound later.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Binds a label here.
    pub fn bind(&mut self, l: Label) {
        self.labels[l.0] = Some(self.code.len());
    }

    /// A label bound here.
    pub fn here(&mut self) -> Label {
        let l = self.label();
        self.bind(l);
        l
    }

    /// Resolves all jumps.
    pub fn finish(&mut self) -> &[u8] {
        for (at, l) in self.fixups.drain(..) {
            let to = self.labels[l.0].unwrap_or(at + 4);
            let rel = (to as i64 - (at as i64 + 4)) as i32;
            self.code[at..at + 4].copy_from_slice(&rel.to_le_bytes());
        }
        &self.code
    }

    /// Offset of a bound label.
    pub fn offset_of(&self, l: Label) -> usize {
        self.labels[l.0].unwrap_or(0)
    }

    fn bytes(&mut self, b: &[u8]) {
        self.code.extend_from_slice(b);
    }

    fn u32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }

    /// Encodes a (rewritten) instruction without adding it; `None` if it has no 64-bit encoding.
    /// It must not address memory relative to RIP.
    pub fn encode(&mut self, i: &Instruction) -> Option<Encoded> {
        let ok = self.enc.encode(i, self.base).is_ok();
        let mut b = self.enc.take_buffer();
        let mut out = Encoded {
            bytes: [0; 16],
            len: 0,
        };
        let fits = ok && b.len() <= out.bytes.len();
        if fits {
            out.bytes[..b.len()].copy_from_slice(&b);
            out.len = b.len();
        }
        // The encoder's buffer keeps its allocation.
        b.clear();
        self.enc.set_buffer(b);
        fits.then_some(out)
    }

    /// Adds an encoded instruction.
    pub fn add(&mut self, i: &Encoded) {
        self.code.extend_from_slice(&i.bytes[..i.len]);
    }

    fn rex(w: bool, r: u8, x: u8, b: u8) -> u8 {
        0x40 | u8::from(w) << 3 | (r >> 3) << 2 | (x >> 3) << 1 | b >> 3
    }

    /// ModRM and SIB of `[rsp + disp]`, with the displacement in one byte if it fits.
    fn in_frame(&mut self, reg: u8, disp: usize) {
        let field = (reg & 7) << 3;
        match u8::try_from(disp) {
            Ok(short @ 0..=127) => self.bytes(&[0x44 | field, 0x24, short]),
            _ => {
                self.bytes(&[0x84 | field, 0x24]);
                self.u32(disp as u32);
            }
        }
    }

    /// `op reg, [rsp + disp]` for one-byte opcodes.
    fn frame_op(&mut self, opcode: u8, w: bool, reg: u8, disp: usize) {
        let rex = Self::rex(w, reg, 0, 0);
        if rex != 0x40 {
            self.bytes(&[rex]);
        }
        self.bytes(&[opcode]);
        self.in_frame(reg, disp);
    }

    /// `mov reg, [frame + disp]` (64 bit).
    pub fn load(&mut self, reg: u8, disp: usize) {
        self.frame_op(0x8b, true, reg, disp);
    }
    /// `movzx reg32, word [frame + disp]`.
    pub fn load16(&mut self, reg: u8, disp: usize) {
        let rex = Self::rex(false, reg, 0, 0);
        if rex != 0x40 {
            self.bytes(&[rex]);
        }
        self.bytes(&[0x0f, 0xb7]);
        self.in_frame(reg, disp);
    }
    /// `mov reg32, [frame + disp]`.
    pub fn load32(&mut self, reg: u8, disp: usize) {
        self.frame_op(0x8b, false, reg, disp);
    }
    /// `mov [frame + disp], reg` (64 bit).
    pub fn store(&mut self, disp: usize, reg: u8) {
        self.frame_op(0x89, true, reg, disp);
    }
    /// `mov dword [frame + disp], imm`.
    pub fn store_imm32(&mut self, disp: usize, imm: u32) {
        self.bytes(&[0xc7]);
        self.in_frame(0, disp);
        self.u32(imm);
    }
    /// Notes that the constant that ends `back` bytes before the end depends on something.
    fn note(&mut self, bytes: usize, back: usize, depends: Depends) {
        match u16::try_from(self.code.len() - back - bytes) {
            Ok(at) => self.relocs.push(Reloc { at, depends }),
            Err(_) => self.fixed = true,
        }
    }
    /// [`Emitter::mov_imm`] of a value that is the block's RIP plus something, or something less it.
    pub fn mov_rip(&mut self, reg: u8, value: u64, depends: Depends) {
        let before = self.code.len();
        self.mov_imm(reg, value);
        if self.code.len() - before == 10 {
            self.note(8, 0, depends);
        } else {
            self.fixed = true;
        }
    }
    /// Stores the block's RIP plus something in the frame; may use `scratch`.
    pub fn store_rip(&mut self, disp: usize, value: u64, scratch: u8) {
        if i32::try_from(value as i64).is_ok() {
            self.fixed = true;
            self.store_imm64(disp, value, scratch);
        } else {
            self.mov_rip(scratch, value, Depends::Rip);
            self.store(disp, scratch);
        }
    }
    /// `mov dword [frame + disp], imm`, where the constant depends on something.
    pub fn store_dependent(&mut self, disp: usize, imm: u32, depends: Depends) {
        self.store_imm32(disp, imm);
        self.note(4, 0, depends);
    }
    /// `mov reg32, [frame + disp]` of a code-TLB slot.
    pub fn load_code_slot(&mut self, reg: u8, disp: usize) {
        self.load32(reg, disp);
        self.note(4, 0, Depends::CodeSlot);
    }
    /// `cmp dword [frame + disp], imm` of a code-TLB slot.
    pub fn cmp_code_slot(&mut self, disp: usize, imm: u32) {
        self.cmp_frame32(disp, imm);
        self.note(4, 4, Depends::CodeSlot);
    }
    /// Stores a 64-bit constant in the frame; may use `scratch`.
    pub fn store_imm64(&mut self, disp: usize, imm: u64, scratch: u8) {
        if let Ok(v) = i32::try_from(imm as i64) {
            self.bytes(&[0x48, 0xc7]);
            self.in_frame(0, disp);
            self.u32(v as u32);
        } else {
            self.mov_imm(scratch, imm);
            self.store(disp, scratch);
        }
    }
    /// `cmp dword [frame + disp], 0`.
    pub fn cmp_frame32_zero(&mut self, disp: usize) {
        self.bytes(&[0x83]);
        self.in_frame(7, disp);
        self.bytes(&[0]);
    }
    /// `cmp dword [frame + disp], imm`.
    pub fn cmp_frame32(&mut self, disp: usize, imm: u32) {
        self.bytes(&[0x81]);
        self.in_frame(7, disp);
        self.u32(imm);
    }
    /// `mov byte [frame + disp], imm`.
    pub fn store_imm8(&mut self, disp: usize, imm: u8) {
        self.bytes(&[0xc6]);
        self.in_frame(0, disp);
        self.bytes(&[imm]);
    }
    /// `and byte [frame + disp], imm`.
    pub fn and_frame8(&mut self, disp: usize, imm: u8) {
        self.bytes(&[0x80]);
        self.in_frame(4, disp);
        self.bytes(&[imm]);
    }
    /// `or byte [frame + disp], imm`.
    pub fn or_frame8(&mut self, disp: usize, imm: u8) {
        self.bytes(&[0x80]);
        self.in_frame(1, disp);
        self.bytes(&[imm]);
    }
    /// `xor reg32, [frame + disp]`.
    pub fn xor_frame32(&mut self, reg: u8, disp: usize) {
        self.frame_op(0x33, false, reg, disp);
    }
    /// `or a, b` (64 bit).
    pub fn or(&mut self, a: u8, b: u8) {
        self.bytes(&[Self::rex(true, b, 0, a), 0x09, 0xc0 | (b & 7) << 3 | a & 7]);
    }
    /// `and a, b` (64 bit).
    pub fn and(&mut self, a: u8, b: u8) {
        self.bytes(&[Self::rex(true, b, 0, a), 0x21, 0xc0 | (b & 7) << 3 | a & 7]);
    }
    /// `test reg32, imm`.
    pub fn test32(&mut self, reg: u8, imm: u32) {
        self.bytes(&[Self::rex(false, 0, 0, reg), 0xf7, 0xc0 | reg & 7]);
        self.u32(imm);
    }
    /// `shl reg32, n`.
    pub fn shl32(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(false, 0, 0, reg), 0xc1, 0xe0 | reg & 7, n]);
    }
    /// The host's RFLAGS to a register, by way of the entry stack below the frame.
    pub fn host_flags_to(&mut self, reg: u8) {
        self.bytes(&[0x9c, Self::rex(false, 0, 0, reg), 0x58 | reg & 7]);
    }
    /// Arithmetic flags from the low 16 bits of a flags image in `image` (R8-R15).
    pub fn image_to_flags(&mut self, image: u8) {
        use super::layout::gpr;
        self.store(gpr(0), 0);
        self.mov(0, image, false);
        self.shl32(0, 8); // AH = low byte, AL = 0
        self.bytes(&[
            Self::rex(false, 0, 0, image),
            0x0f,
            0xba,
            0xe0 | image & 7,
            11,
        ]); // bt image, 11
        self.bytes(&[0x14, 0, 0x04, 0x7f, 0x9e]); // adc al, 0; add al, 7fh; sahf
        self.load(0, gpr(0));
    }
    /// Brings saved flags back; if ZF was clear just before, goes on at `l` instead, with the
    /// flags back as well.
    pub fn restore_flags_if_nonzero(&mut self, l: Label) {
        // jz +n; restore; jmp l; restore
        self.bytes(&[0x74, 0]);
        let at = self.code.len();
        self.restore_flags();
        self.jmp(l);
        let n = self.code.len() - at;
        assert!(n < 128, "short jump");
        self.code[at - 1] = n as u8;
        self.restore_flags();
    }
    /// `jmp [frame + disp]`.
    pub fn jmp_frame(&mut self, disp: usize) {
        self.bytes(&[0xff]);
        self.in_frame(4, disp);
    }
    /// `call [frame + disp]`.
    pub fn call_frame(&mut self, disp: usize) {
        self.bytes(&[0xff]);
        self.in_frame(2, disp);
    }
    /// `mov reg, imm` in the shortest form, flags kept.
    pub fn mov_imm(&mut self, reg: u8, imm: u64) {
        if let Ok(v) = u32::try_from(imm) {
            self.bytes(&[Self::rex(false, 0, 0, reg), 0xb8 | reg & 7]);
            self.u32(v);
        } else if let Ok(v) = i32::try_from(imm as i64) {
            self.bytes(&[Self::rex(true, 0, 0, reg), 0xc7, 0xc0 | reg & 7]);
            self.u32(v as u32);
        } else {
            self.bytes(&[Self::rex(true, 0, 0, reg), 0xb8 | reg & 7]);
            self.bytes(&imm.to_le_bytes());
        }
    }
    /// `mov dst, src`; 32 bit zero-extends.
    pub fn mov(&mut self, dst: u8, src: u8, w: bool) {
        self.bytes(&[
            Self::rex(w, src, 0, dst),
            0x89,
            0xc0 | (src & 7) << 3 | dst & 7,
        ]);
    }
    /// `lea dst, [address]`; 32 bit truncates and zero-extends. Keeps flags.
    pub fn lea(&mut self, dst: u8, a: Address, w: bool) {
        self.mem_op(0x8d, w, dst, a);
    }
    /// `mov dst, [address]` of 8 or 4 bytes.
    pub fn load_mem(&mut self, dst: u8, a: Address, w: bool) {
        self.mem_op(0x8b, w, dst, a);
    }
    /// `mov [address], src` of 8 or 4 bytes.
    pub fn store_mem(&mut self, a: Address, src: u8, w: bool) {
        self.mem_op(0x89, w, src, a);
    }
    /// `mov [address], imm32` (sign-extended) of 8 or 4 bytes.
    pub fn store_mem_imm(&mut self, a: Address, imm: i32, w: bool) {
        self.mem_op(0xc7, w, 0, a);
        self.u32(imm as u32);
    }
    fn mem_op(&mut self, opcode: u8, w: bool, reg: u8, a: Address) {
        let (x, scale) = a.index.map_or((RSP, 0), |(r, s)| (r, s));
        let index_rex = a.index.map_or(0, |(r, _)| r);
        let base_rex = a.base.unwrap_or(0);
        self.bytes(&[Self::rex(w, reg, index_rex, base_rex), opcode]);
        let sib = |base: u8| scale << 6 | (x & 7) << 3 | base & 7;
        match a.base {
            // No base: SIB with base 101 and disp32.
            None => {
                self.bytes(&[(reg & 7) << 3 | 4, sib(5)]);
                self.u32(a.disp as u32);
            }
            Some(b) => {
                // [rbp], [r13] need a displacement.
                let no_disp = a.disp == 0 && b & 7 != 5;
                let short = i8::try_from(a.disp).is_ok();
                let md = if no_disp {
                    0
                } else if short {
                    0x40
                } else {
                    0x80
                };
                self.bytes(&[md | (reg & 7) << 3 | 4, sib(b)]);
                if !no_disp && short {
                    self.bytes(&[a.disp as i8 as u8]);
                } else if !no_disp {
                    self.u32(a.disp as u32);
                }
            }
        }
    }
    /// `pext dst, src, [frame + disp]` (BMI2, keeps flags).
    pub fn pext_frame(&mut self, dst: u8, src: u8, disp: usize) {
        // VEX.LZ.F3.0F38.W1 F5 /r
        let r = if dst >= 8 { 0 } else { 0x80 };
        self.bytes(&[
            0xc4,
            r | 0x40 | 0x20 | 2,
            0x80 | (!src & 0xf) << 3 | 2,
            0xf5,
        ]);
        self.in_frame(dst, disp);
    }
    /// `rorx dst, src, n` (BMI2, keeps flags).
    pub fn rorx(&mut self, dst: u8, src: u8, n: u8) {
        // VEX.LZ.F2.0F3A.W1 F0 /r ib
        let r = if dst >= 8 { 0 } else { 0x80 };
        let b = if src >= 8 { 0 } else { 0x20 };
        self.bytes(&[0xc4, r | 0x40 | b | 3, 0xfb, 0xf0]);
        self.bytes(&[0xc0 | (dst & 7) << 3 | src & 7, n]);
    }
    /// `ror reg, n` (64 bit).
    pub fn ror(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0xc1, 0xc8 | reg & 7, n]);
    }
    /// `op T0|T1, [frame + T1*8 + disp]`: XOR T0 (33H) or MOV T1 (8BH).
    pub fn table_op(&mut self, opcode: u8, reg: u8, disp: usize) {
        self.bytes(&[0x4e, opcode, 0x84 | (reg & 7) << 3, 0xdc]);
        self.u32(disp as u32);
    }
    /// `jmp [frame + T1*8 + disp]`.
    pub fn jmp_table(&mut self, disp: usize) {
        self.bytes(&[0x42, 0xff, 0xa4, 0xdc]);
        self.u32(disp as u32);
    }
    /// `cmp reg, imm32` (64 bit).
    pub fn cmp_imm(&mut self, reg: u8, imm: i32) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0x81, 0xf8 | reg & 7]);
        self.u32(imm as u32);
    }
    /// `shr reg32, n`.
    pub fn shr32(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(false, 0, 0, reg), 0xc1, 0xe8 | reg & 7, n]);
    }
    /// `sar reg, n` (64 bit).
    pub fn sar(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0xc1, 0xf8 | reg & 7, n]);
    }
    /// `and reg32, imm`.
    pub fn and32(&mut self, reg: u8, imm: u32) {
        self.bytes(&[Self::rex(false, 0, 0, reg), 0x81, 0xe0 | reg & 7]);
        self.u32(imm);
    }
    /// `jcc label`; `cc` is the condition code of the encoding.
    pub fn jcc(&mut self, cc: u8, l: Label) {
        self.bytes(&[0x0f, 0x80 | cc]);
        self.fixup(l);
    }
    /// Bytes that are not code.
    pub fn data(&mut self, b: &[u8]) {
        self.bytes(b);
    }
    /// 32 bits that are not code and depend on something.
    pub fn data_dependent(&mut self, value: u32, depends: Depends) {
        self.u32(value);
        self.note(4, 0, depends);
    }
    /// `jmp label`.
    pub fn jmp(&mut self, l: Label) {
        self.bytes(&[0xe9]);
        self.fixup(l);
    }
    /// `jmp` to a host address within reach.
    pub fn jmp_to(&mut self, to: u64) {
        let next = self.address().wrapping_add(5);
        self.bytes(&[0xe9]);
        self.u32(to.wrapping_sub(next) as u32);
    }
    fn fixup(&mut self, l: Label) {
        self.fixups.push((self.code.len(), l));
        self.u32(0);
    }
    /// `jrcxz` over the code that `skipped` emits (at most 127 bytes).
    pub fn jrcxz_over(&mut self, skipped: impl FnOnce(&mut Emitter)) {
        self.bytes(&[0xe3, 0]);
        let at = self.code.len();
        skipped(self);
        let n = self.code.len() - at;
        assert!(n < 128, "short jump");
        self.code[at - 1] = n as u8;
    }
    /// `jrcxz` to `rcx != 0` code: jumps over when RCX is not zero.
    pub fn unless_rcxz(&mut self, when_zero: impl FnOnce(&mut Emitter)) {
        // jrcxz +2; jmp over; when_zero; over:
        self.bytes(&[0xe3, 2, 0xeb, 0]);
        let at = self.code.len();
        when_zero(self);
        let n = self.code.len() - at;
        assert!(n < 128, "short jump");
        self.code[at - 1] = n as u8;
    }
    /// Saves the arithmetic flags in `Hot::flags` and RAX in `Hot::save_rax`; keeps RAX.
    pub fn save_flags(&mut self) {
        use super::layout::{FLAGS, SAVE_RAX};
        self.store(SAVE_RAX, 0);
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.store(FLAGS, 0);
        self.load(0, SAVE_RAX);
    }
    /// Saves the arithmetic flags in `Hot::flags`; keeps RAX by way of `scratch`.
    pub fn save_flags_by(&mut self, scratch: u8) {
        self.mov(scratch, 0, true);
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.store(super::layout::FLAGS, 0);
        self.mov(0, scratch, true);
    }
    /// Brings back what [`Emitter::save_flags_by`] saved.
    pub fn restore_flags_by(&mut self, scratch: u8) {
        self.mov(scratch, 0, true);
        self.load(0, super::layout::FLAGS);
        self.bytes(&[0x04, 0x7f, 0x9e]); // add al, 7fh; sahf
        self.mov(0, scratch, true);
    }
    /// Brings back what [`Emitter::save_flags`] saved.
    pub fn restore_flags(&mut self) {
        use super::layout::{FLAGS, SAVE_RAX};
        self.load(0, FLAGS);
        self.bytes(&[0x04, 0x7f, 0x9e]); // add al, 7fh; sahf
        self.load(0, SAVE_RAX);
    }
}
