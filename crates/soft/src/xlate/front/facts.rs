//! What an instruction does to its operands, found out once per instruction code: asking the
//! decoder takes longer than decoding.

use iced_x86::{
    Code, Instruction, InstructionInfoFactory, InstructionInfoOptions, OpAccess, OpKind,
};

/// How instructions of a code use memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Not.
    None,
    /// An operand names memory without touching it.
    Named,
    /// One operand, read.
    Read,
    /// One operand, written or perhaps written, read or not.
    Write,
    /// More than one operand.
    Several,
}

/// What is the same for all instructions of a code that name memory, and for those that do not.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// How they use memory.
    pub memory: Memory,
    /// Operands that are written or may be, a bit each.
    written: u8,
}

impl Facts {
    /// True if operand `n` is written or may be.
    pub fn writes(self, n: u32) -> bool {
        self.written & 1 << n != 0
    }
}

/// The facts of what was met.
pub struct AllFacts {
    info: InstructionInfoFactory,
    known: Vec<Option<Facts>>,
}

impl AllFacts {
    /// None yet.
    pub fn new() -> AllFacts {
        AllFacts {
            info: InstructionInfoFactory::new(),
            known: vec![None; 2 * Code::values().count()],
        }
    }

    /// Those of an instruction's code.
    pub fn of(&mut self, i: &Instruction) -> Facts {
        // Many codes take a register or memory in the same place.
        let names_memory = i.op_kinds().any(|k| k == OpKind::Memory);
        let n = 2 * i.code() as usize + usize::from(names_memory);
        if let Some(Some(f)) = self.known.get(n) {
            return *f;
        }
        let info = self
            .info
            .info_options(i, InstructionInfoOptions::NO_REGISTER_USAGE);
        let memory = match info.used_memory() {
            [] => Memory::None,
            [one] => match one.access() {
                OpAccess::NoMemAccess => Memory::Named,
                OpAccess::Read | OpAccess::CondRead => Memory::Read,
                _ => Memory::Write,
            },
            _ => Memory::Several,
        };
        let mut written = 0;
        for op in 0..i.op_count() {
            let writes = matches!(
                info.op_access(op),
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            );
            written |= u8::from(writes) << op;
        }
        let facts = Facts { memory, written };
        if let Some(place) = self.known.get_mut(n) {
            *place = Some(facts);
        }
        facts
    }

    /// The registers that an instruction uses: these are its own.
    pub fn registers(&mut self, i: &Instruction) -> &[iced_x86::UsedRegister] {
        self.info
            .info_options(i, InstructionInfoOptions::NO_MEMORY_USAGE)
            .used_registers()
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::Decoder;

    use super::*;

    #[test]
    fn register_and_memory_forms_of_a_code_are_told_apart() {
        let mut all = AllFacts::new();
        let mut of = |bytes: &[u8]| {
            let i = Decoder::new(64, bytes, 0).decode();
            let f = all.of(&i);
            (f.memory, f.writes(0), f.writes(1))
        };
        // mov rax, rbx; mov rax, [rbx]: one code. xor eax, eax; xor eax, ebx: another.
        assert_eq!(of(&[0x48, 0x8b, 0xc3]), (Memory::None, true, false));
        assert_eq!(of(&[0x48, 0x8b, 0x03]), (Memory::Read, true, false));
        assert_eq!(of(&[0x48, 0x89, 0xc3]), (Memory::None, true, false));
        assert_eq!(of(&[0x48, 0x89, 0x03]), (Memory::Write, true, false));
        assert_eq!(of(&[0x33, 0xc0]), (Memory::None, true, false));
        assert_eq!(of(&[0x33, 0xc3]), (Memory::None, true, false));
        assert_eq!(of(&[0x48, 0x87, 0x03]), (Memory::Write, true, true));
        assert_eq!(of(&[0x48, 0x8d, 0x03]).0, Memory::None);
        assert_eq!(of(&[0x48, 0xa5]).0, Memory::Several);
    }
}
