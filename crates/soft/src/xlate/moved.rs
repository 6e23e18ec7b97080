//! Translations at another RIP: a copy with its constants changed.
//!
//! Systems load the same programs and libraries at new addresses for each process. The code is the
//! same, at the same guest-physical address, and so is its translation but for a few constants,
//! which the emitter has noted ([`Reloc`]). Copying is much cheaper than translating.

use pyrite_mem::PAGE_SIZE;

use super::cache::{Block, BlockKey, Cache, Exit};
use super::code_tlb::PageCheck;
use super::emit::{Depends, Reloc};
use super::{add, layout, make_room, mark, mode, protect};
use crate::frame::View;
use crate::vcpu::SoftVcpu;

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
    /// Index that it will get.
    pub id: u32,
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
            Depends::Id => change32(code, at, |_| to.id)?,
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
        past_poll: b.past_poll - b.start,
        // Those that were made later are not in the code that is copied.
        others: b.others.filter(|o| o.far < b.end).map(|o| o.less(b.start)),
        flags_live: b.flags_live,
        start: 0,
        end: b.end - b.start,
        page: to.page,
        second: None,
        guest_len: b.guest_len,
        insns: b.insns,
        looked: b.looked,
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

/// LIMIT: blocks that are copied at once.
const MOVED_AT_ONCE: usize = 24;

/// Serves a key by copying the translation of the same code at another RIP, if there is one. What it
/// was linked to on the same page comes along: it will be wanted next.
pub fn move_block(v: &mut SoftVcpu, key: BlockKey) -> Option<u32> {
    let user = key.mode & mode::VIEW == View::User as u32;
    if !user || key.mode & mode::CODE64 == 0 || !v.vm.options.move_blocks {
        return None;
    }
    let mut old = v.xlate.cache.movable(&key)?;
    make_room(v);
    // Gone with the rest, perhaps.
    let flushes = v.xlate.cache.flushes;
    old = v.xlate.cache.movable(&key).filter(|&o| o == old)?;
    if v.xlate.code_tlb.needs_clearing(key.mode & mode::UNITS) {
        return None;
    }
    let page_off =
        v.vm.memory
            .read_offset(key.gpa & !(PAGE_SIZE - 1), PAGE_SIZE)?;
    let page = PageCheck {
        slot: v.xlate.code_tlb.slot(key.rip, user)?,
        value: v.xlate.code_tlb.value(key.gpa, key.mode & mode::UNITS)?,
    };
    protect(v, page_off);
    let first = move_one(v, old, key, page, page_off)?;
    // The old block, the new one.
    let mut todo = vec![(old, first)];
    let mut moved = 1;
    while let Some((from, to)) = todo.pop() {
        let b = &v.xlate.cache.blocks[from as usize];
        let by = v.xlate.cache.blocks[to as usize]
            .key
            .rip
            .wrapping_sub(b.key.rip);
        let (old_exit, new_exit) = (b.first_exit, v.xlate.cache.blocks[to as usize].first_exit);
        let end = b.key.rip.wrapping_add(u64::from(b.guest_len));
        for n in 0..b.exits {
            let cache = &v.xlate.cache;
            let exit = &cache.exits[(old_exit + n) as usize];
            let Some(next) = exit.linked else { continue };
            let (b, target) = (&cache.blocks[from as usize], &cache.blocks[next as usize]);
            if target.dead
                || target.second.is_some()
                || target.key.rip != exit.target
                || (target.key.rip ^ b.key.rip) >> 12 != 0
                || (target.key.gpa ^ b.key.gpa) >> 12 != 0
            {
                continue;
            }
            // Every loop must notice the exit request.
            let backward = exit.target <= end;
            let key = BlockKey {
                rip: target.key.rip.wrapping_add(by),
                ..target.key
            };
            let there = match cache.find(&key) {
                Some(id) => id,
                None if moved < MOVED_AT_ONCE && target.relocs.is_some() => {
                    let Some(id) = move_one(v, next, key, page, page_off) else {
                        continue;
                    };
                    moved += 1;
                    todo.push((next, id));
                    id
                }
                None => continue,
            };
            let known = &v.xlate.cache.blocks[there as usize];
            if known.second.is_none() && (known.polls || !backward) {
                v.xlate.cache.link(new_exit + n, there, true);
            }
        }
    }
    debug_assert_eq!(v.xlate.cache.flushes, flushes, "copies make no room");
    Some(first)
}

/// Copies one block to another RIP.
fn move_one(
    v: &mut SoftVcpu,
    old: u32,
    key: BlockKey,
    page: PageCheck,
    page_off: u64,
) -> Option<u32> {
    if v.xlate.must_poll.contains_key(&key) && !v.xlate.cache.blocks[old as usize].polls {
        return None;
    }
    let cache = &v.xlate.cache;
    let target = Target {
        key,
        base: cache.base() + cache.free_at() as u64,
        first_exit: cache.exits.len() as u32,
        id: cache.blocks.len() as u32,
        page,
    };
    let mut code = std::mem::take(&mut v.xlate.moving);
    let copied = copy(&v.xlate.cache, old, &target, &mut code);
    let done = copied.and_then(|(block, exits)| {
        // The old block lives, so the code is unchanged, or the news is on its way to both. The
        // marks may be gone in the latter case.
        let at = key.gpa & (PAGE_SIZE - 1);
        mark(&v.vm, page_off, at, block.guest_len as usize)?;
        for (at, len) in block.looked {
            mark(&v.vm, page_off, at.into(), len.into())?;
        }
        if !v.xlate.cache.fits(code.len()) {
            return None;
        }
        v.xlate.stats.moved += 1;
        Some(add(&mut v.xlate.cache, &code, block, exits))
    });
    v.xlate.moving = code;
    done
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

#[cfg(test)]
mod tests {
    use super::super::front::{Front, HostFeatures, Place, Tools};
    use super::*;
    use crate::vm::SoftOptions;

    /// Code with every kind of constant that depends on RIP.
    const CODE: &[u8] = &[
        0x53, // push rbx
        0x48, 0x8b, 0x05, 0x10, 0x20, 0x00, 0x00, // mov rax, [rip + 2010h]
        0x48, 0x8d, 0x3d, 0x00, 0x30, 0x00, 0x00, // lea rdi, [rip + 3000h]
        0x48, 0x01, 0xd8, // add rax, rbx
        0x48, 0x8b, 0x4e, 0x08, // mov rcx, [rsi + 8]
        0x4c, 0x89, 0x56, 0x10, // mov [rsi + 10h], r10
        0x66, 0x0f, 0xef, 0xc0, // pxor xmm0, xmm0
        0xf3, 0xa4, // rep movsb
        0x0f, 0xa2, // cpuid
        0x5b, // pop rbx
    ];
    const ENDS: &[&[u8]] = &[
        &[0xe8, 0x00, 0x50, 0x00, 0x00], // call to another page
        &[0x75, 0xf0],                   // jne back
        &[0xff, 0xd0],                   // call rax
        &[0xff, 0x25, 0, 1, 0, 0],       // jmp [rip + 100h]
        &[0xc3],                         // ret
        &[0x0f, 0x05],                   // syscall
        &[0xf4],                         // hlt, the interpreter's
    ];

    fn key(rip: u64) -> BlockKey {
        let units = mode::CODE64 | mode::X87 | mode::SSE | mode::AVX;
        BlockKey {
            gpa: 0x12_3456,
            rip,
            mode: View::User as u32 | units,
        }
    }

    fn place(cache: &Cache, rip: u64, slot: u32) -> Place {
        Place {
            key: key(rip),
            base: cache.base() + cache.free_at() as u64,
            first_exit: cache.exits.len() as u32,
            id: cache.blocks.len() as u32,
            force_poll: false,
            page: PageCheck { slot, value: 77 },
            second: None,
            entries: true,
        }
    }

    #[test]
    fn a_moved_block_is_what_a_translation_would_be() {
        let options = SoftOptions::default();
        let host = HostFeatures {
            bmi2: true,
            decoder: 0,
        };
        let (old_rip, new_rip) = (0x5555_5555_4456, 0x7f12_3456_7456);
        for end in ENDS {
            let bytes = [CODE, end].concat();
            let mut cache = Cache::new(1 << 20).expect("memory");
            let mut tools = Tools::new();
            let mut translate = |place| {
                let t = Front::translate(&mut tools, &bytes, &[], place, &|_| true, &options, host);
                (t.code.to_vec(), t.block, t.exits)
            };
            let (code, block, exits) = translate(place(&cache, old_rip, 5));
            assert!(block.relocs.is_some(), "{end:x?}");
            let id = add(&mut cache, &code, block, exits);
            // Links must not be copied.
            if !cache.exits.is_empty() {
                cache.link(0, id, true);
            }
            let at = place(&cache, new_rip, 9);
            let (fresh, fresh_block, fresh_exits) = translate(at);
            let target = Target {
                key: at.key,
                base: at.base,
                first_exit: at.first_exit,
                id: at.id,
                page: at.page,
            };
            let mut moved = Vec::new();
            let (block, exits) = copy(&cache, id, &target, &mut moved).expect("can be moved");
            assert_eq!(moved, fresh, "{end:x?}");
            assert_eq!(block.map, fresh_block.map);
            assert_eq!(block.relocs, fresh_block.relocs);
            let targets = |x: &[Exit]| x.iter().map(|x| x.target).collect::<Vec<_>>();
            assert_eq!(targets(&exits), targets(&fresh_exits));
        }
    }

    #[test]
    fn blocks_near_the_end_of_the_user_half_stay() {
        let options = SoftOptions::default();
        let host = HostFeatures {
            bmi2: true,
            decoder: 0,
        };
        let mut cache = Cache::new(1 << 20).expect("memory");
        let mut tools = Tools::new();
        let at = place(&cache, 0x5555_5555_4456, 1);
        let t = Front::translate(
            &mut tools,
            &[0x90, 0xc3],
            &[],
            at,
            &|_| true,
            &options,
            host,
        );
        let (code, block, exits) = (t.code.to_vec(), t.block, t.exits);
        let id = add(&mut cache, &code, block, exits);
        let target = Target {
            key: key(0x7fff_ffff_f456),
            base: 0,
            first_exit: 0,
            id: 1,
            page: at.page,
        };
        assert!(copy(&cache, id, &target, &mut Vec::new()).is_none());
    }
}
