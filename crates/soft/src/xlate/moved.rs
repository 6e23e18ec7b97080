//! Translations at another RIP: a copy with its constants changed.
//!
//! Systems load the same programs and libraries at new addresses for each process. The code is the
//! same, at the same guest-physical address, and so is its translation but for a few constants,
//! which the emitter has noted ([`Reloc`]). Copying is much cheaper than translating.

use super::cache::{Block, BlockKey, Cache, Exit};
use super::code_tlb::PageCheck;
use super::emit::{Depends, Reloc};
use super::layout;

/// User addresses well inside the canonical half: no branch reaches its end.
const HIGHEST_RIP: u64 = 0x7fff_0000_0000;

/// Where the copy goes.
pub struct Target {
    /// The new block's key: as that of the old but for RIP.
    pub key: BlockKey,
    /// Host address at which it will execute.
    pub base: u64,
    /// Index that its first exit will get.
    pub first_exit: u32,
    /// Its page's check.
    pub page: PageCheck,
}

/// Makes the copy of block `id` in `code`. The block's offsets are relative to its first byte, as
/// those of a new translation. `None` if it cannot be moved.
pub fn copy(cache: &Cache, id: u32, to: &Target, code: &mut Vec<u8>) -> Option<(Block, Vec<Exit>)> {
    let b = &cache.blocks[id as usize];
    let relocs = b.relocs.as_ref()?;
    if b.key.rip.max(to.key.rip) >= HIGHEST_RIP {
        return None;
    }
    let by = to.key.rip.wrapping_sub(b.key.rip);
    let host_by = to.base.wrapping_sub(cache.base() + u64::from(b.start)) as u32;
    code.clear();
    code.extend_from_slice(cache.code(id));
    for &Reloc { at, depends } in relocs.iter() {
        let at = usize::from(at);
        match depends {
            Depends::Rip => change64(code, at, |v| v.wrapping_add(by))?,
            Depends::NegRip => change64(code, at, |v| v.wrapping_sub(by))?,
            Depends::Exit => {
                change32(code, at, |v| {
                    v.wrapping_sub(b.first_exit).wrapping_add(to.first_exit)
                })?;
            }
            Depends::CodeSlot => {
                change32(code, at, |_| layout::code_tlb(to.page.slot) as u32)?;
            }
            Depends::Host => change32(code, at, |v| v.wrapping_add(host_by))?,
        }
    }
    let first = b.first_exit as usize;
    let exits = cache.exits.get(first..first + b.exits as usize)?;
    let mut moved = Vec::with_capacity(exits.len());
    for x in exits {
        let (patch_at, stub_at) = (x.patch_at - b.start, x.stub_at - b.start);
        // The jump may be linked in the old block.
        change32(code, patch_at as usize, |_| {
            stub_at.wrapping_sub(patch_at + 4)
        })?;
        moved.push(Exit {
            target: x.target.wrapping_add(by),
            plain: x.plain,
            patch_at,
            stub_at,
            linked: None,
            owner: 0,
        });
    }
    let block = Block {
        key: to.key,
        entry: b.entry - b.start,
        checked_entry: b.checked_entry - b.start,
        far_entry: b.far_entry - b.start,
        start: 0,
        end: b.end - b.start,
        page: to.page,
        second: None,
        guest_len: b.guest_len,
        insns: b.insns,
        map: b.map.clone(),
        incoming: Vec::new(),
        interpret_first: b.interpret_first,
        polls: b.polls,
        relocs: b.relocs.clone(),
        first_exit: to.first_exit,
        exits: b.exits,
        pops: b.pops,
        dead: false,
    };
    Some((block, moved))
}

fn change64(code: &mut [u8], at: usize, f: impl FnOnce(u64) -> u64) -> Option<()> {
    let bytes = code.get_mut(at..at + 8)?;
    let value = f(u64::from_le_bytes((&*bytes).try_into().ok()?));
    bytes.copy_from_slice(&value.to_le_bytes());
    Some(())
}

fn change32(code: &mut [u8], at: usize, f: impl FnOnce(u32) -> u32) -> Option<()> {
    let bytes = code.get_mut(at..at + 4)?;
    let value = f(u32::from_le_bytes((&*bytes).try_into().ok()?));
    bytes.copy_from_slice(&value.to_le_bytes());
    Some(())
}
