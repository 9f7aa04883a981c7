//! Finds the instructions in a module's code that make a memory call.
//!
//! glibc makes nearly all of its calls as `mov $number, %eax; syscall`. That `mov` has exactly five
//! bytes, like a near jump. A *site* is such an instruction, or another one of at least five bytes,
//! together with everything up to the `syscall`. Only this first instruction is replaced, so no
//! thread is ever in the middle of the replaced bytes. The scanner disassembles the functions that
//! contain the bytes of a site, from their starts. The scanner does not patch a site unless the
//! site's code is proven safe to move.

use super::super::handler::CALLS;
use super::super::starts::Starts;
use super::call_handler::Keep;
use iced_x86::RflagsBits as Flags;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess,
    OpKind, Register,
};
use std::ops::Range;

/// The size of a patch: one jump.
pub(in crate::hook::glibc) const PATCH: usize = 5;

/// A site that can be patched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::hook::glibc) struct Found {
    /// The address of the instruction to replace.
    pub(in crate::hook::glibc) address: u64,
    /// The address of the `syscall` instruction. The instructions from `address` up to it run in
    /// the trampoline.
    pub(in crate::hook::glibc) syscall: u64,
    /// The system call number. `None` in `syscall(2)`, where only the caller knows the number.
    pub(in crate::hook::glibc) number: Option<u32>,
    /// What the stub must preserve for the code after the call.
    pub(in crate::hook::glibc) keep: Keep,
}

/// An executable segment, as it is in memory.
#[derive(Debug, Clone, Copy)]
pub(in crate::hook::glibc) struct Code64<'a> {
    pub(in crate::hook::glibc) bytes: &'a [u8],
    pub(in crate::hook::glibc) start: u64,
}

impl<'a> Code64<'a> {
    /// Decodes the instructions of a part of the code, one after the other.
    fn instructions(self, part: Range<u64>) -> impl Iterator<Item = Instruction> {
        let offset = |address: u64| usize::try_from(address.checked_sub(self.start)?).ok();
        let bytes = offset(part.start)
            .zip(offset(part.end))
            .and_then(|(start, end)| self.bytes.get(start..end));
        Decoder::with_ip(
            64,
            bytes.unwrap_or_default(),
            part.start,
            DecoderOptions::NONE,
        )
        .into_iter()
    }

    pub(in crate::hook::glibc) fn instruction_at(self, at: u64) -> Option<Instruction> {
        self.instructions(at..self.end())
            .next()
            .filter(|instruction| !instruction.is_invalid())
    }

    fn end(self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Finds all sites. `starts` has the starts of functions. `is_generic` tells whether an address
    /// is in `syscall(2)`.
    ///
    /// Around each `syscall` instruction that may belong to a site, the scanner decodes whole
    /// functions from their starts. Without `starts` it decodes everything.
    pub(in crate::hook::glibc) fn sites(
        self,
        starts: Starts<'_>,
        is_generic: impl Fn(u64) -> bool,
    ) -> Vec<Found> {
        let (mut targets, mut found) = (Vec::new(), Vec::new());
        let regions = self.regions(starts, &is_generic);
        for region in &regions {
            let mut at = region.start;
            while at < region.end {
                let end = starts
                    .after(at)
                    .map_or(region.end, |next| next.min(region.end));
                self.decode(at..end, &is_generic, &mut targets, &mut found);
                at = end;
            }
        }
        targets.extend(self.far_targets(starts, &regions, &found));
        targets.sort_unstable();
        // A jump to an address between the patch and the `syscall` would bypass the patch, or land
        // inside it.
        found.retain(|site| {
            let next = targets.partition_point(|target| *target <= site.address);
            targets
                .get(next)
                .is_none_or(|target| *target > site.syscall)
        });
        found
    }

    /// Returns the functions to decode: those near the bytes of a `syscall` instruction that has a
    /// site's instructions before it or is in `syscall(2)`. A short jump into a site can only come
    /// from these functions.
    fn regions(self, starts: Starts<'_>, is_generic: &impl Fn(u64) -> bool) -> Vec<Range<u64>> {
        const SYSCALL: [u8; 2] = *b"\x0f\x05";
        const SHORT_JUMP: u64 = 128;
        const LONGEST_INSTRUCTION: u64 = 15;
        const NEAR: u64 = MAX_MOVED + SHORT_JUMP + LONGEST_INSTRUCTION;
        let mut regions: Vec<Range<u64>> = Vec::new();
        for index in self.occurrences(SYSCALL) {
            let at = self.start + index as u64;
            let before = &self.bytes[index.saturating_sub(MAX_MOVED as usize)..index];
            if !before.windows(PATCH).any(sets_number) && !is_generic(at) {
                continue;
            }
            let start = starts
                .at_or_before(at.saturating_sub(NEAR))
                .unwrap_or(0)
                .max(self.start);
            let end = starts.after(at + NEAR).unwrap_or(u64::MAX).min(self.end());
            match regions.last_mut() {
                Some(last) if start <= last.end => last.end = end,
                _ => regions.push(start..end),
            }
        }
        regions
    }

    /// Returns every index of a pair of bytes.
    fn occurrences(self, [first, second]: [u8; 2]) -> impl Iterator<Item = usize> {
        // Few chunks contain the pair. This loop checks a whole chunk without a branch for each
        // byte.
        const CHUNK: usize = 64;
        let is_here = move |(a, b): (&u8, &u8)| (*a == first) & (*b == second);
        (0..self.bytes.len()).step_by(CHUNK).flat_map(move |start| {
            let chunk = &self.bytes[start..(start + CHUNK + 1).min(self.bytes.len())];
            let pairs = move || chunk.iter().zip(&chunk[1..]);
            let has_any = pairs().fold(false, |any, pair| any | is_here(pair));
            let found = move || pairs().enumerate().filter(move |(_, pair)| is_here(*pair));
            has_any
                .then(found)
                .into_iter()
                .flatten()
                .map(move |(index, _)| start + index)
        })
    }

    /// Finds the sites of a function, and the targets of its jumps and calls.
    fn decode(
        self,
        function: Range<u64>,
        is_generic: &impl Fn(u64) -> bool,
        targets: &mut Vec<u64>,
        found: &mut Vec<Found>,
    ) {
        // The last few instructions. They have run before the current one, unless a jump leads to
        // the current one.
        let mut before: Vec<Instruction> = Vec::new();
        for instruction in self.instructions(function) {
            targets.extend(branches_to(&instruction));
            if instruction.code() == Code::Syscall {
                found.extend(self.site(&before, instruction, is_generic));
            }
            // A call returns, but `rax` may have changed meanwhile.
            if instruction.is_invalid() || instruction.flow_control() != FlowControl::Next {
                before.clear();
            } else {
                if before.len() == REACH {
                    before.remove(0);
                }
                before.push(instruction);
            }
        }
    }

    /// Finds the jumps and calls into sites from code that was not decoded, such as the unlikely
    /// part of a function, which the compiler places elsewhere. A far jump ends in a distance of
    /// four bytes. So every four bytes are treated as a distance. If such a distance leads into a
    /// site, the function around it is decoded, which shows whether the bytes belong to a jump.
    fn far_targets(self, starts: Starts<'_>, regions: &[Range<u64>], found: &[Found]) -> Vec<u64> {
        const DISTANCE: usize = 4;
        /// Whether a site is in the block. For nearly all distances this one look-up is enough.
        const BLOCK: usize = 64;
        let mut blocks = vec![false; self.bytes.len() / BLOCK + 1];
        // An entry for addresses outside the code.
        let outside = blocks.len();
        blocks.push(false);
        for site in found {
            // A site is shorter than a block.
            for address in [site.address, site.syscall] {
                blocks[(address - self.start) as usize / BLOCK] = true;
            }
        }
        let mut targets = Vec::new();
        for (next, distance) in (DISTANCE..).zip(self.bytes.windows(DISTANCE)) {
            let distance =
                i32::from_le_bytes(distance.try_into().expect("a window has its length"));
            let target = next.wrapping_add_signed(distance as isize);
            if !blocks[(target / BLOCK).min(outside)] {
                continue;
            }
            let (next, target) = (self.start + next as u64, self.start + target as u64);
            let may_be = found
                .iter()
                .any(|site| site.address < target && target <= site.syscall)
                && !regions.iter().any(|region| region.contains(&(next - 1)));
            if may_be && self.jumps(starts, next, target) {
                targets.push(target);
            }
        }
        targets
    }

    /// Tells whether the instruction before `next` jumps to `target`.
    fn jumps(self, starts: Starts<'_>, next: u64, target: u64) -> bool {
        let function = starts.at_or_before(next - 1).unwrap_or(0).max(self.start)..next;
        self.instructions(function).any(|instruction| {
            instruction.next_ip() == next && branches_to(&instruction) == Some(target)
        })
    }

    fn site(
        self,
        before: &[Instruction],
        syscall: Instruction,
        is_generic: &impl Fn(u64) -> bool,
    ) -> Option<Found> {
        let mut factory = InstructionInfoFactory::new();
        let mut number = None;
        let mut patched = None;
        for instruction in before.iter().rev() {
            if !can_move(instruction) {
                break;
            }
            if instruction.code() == Code::Mov_r32_imm32
                && instruction.op0_register() == Register::EAX
            {
                number = Some(instruction.immediate32());
                patched = Some(instruction);
                break;
            }
            if patched.is_none() && instruction.len() >= PATCH {
                patched = Some(instruction);
            }
            let writes_number = factory
                .info(instruction)
                .used_registers()
                .iter()
                .any(|used| {
                    used.register().full_register() == Register::RAX
                        && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
                });
            if writes_number {
                break;
            }
        }
        let patched = patched.filter(|patched| syscall.ip() - patched.ip() <= MAX_MOVED)?;
        let is_ours = match number {
            Some(number) => {
                patched.len() == PATCH
                    && CALLS
                        .iter()
                        .any(|call| call.0 == libc::c_long::from(number))
            }
            None => is_generic(syscall.ip()),
        };
        if !is_ours {
            return None;
        }
        let keep = match self.is_needed_after(syscall.next_ip())? {
            true => Keep::All,
            false => Keep::Nothing,
        };
        // In the trampoline, the test of the number overwrites the flags.
        if number.is_none() && keep != Keep::Nothing {
            return None;
        }
        Some(Found {
            address: patched.ip(),
            syscall: syscall.ip(),
            number,
            keep,
        })
    }

    /// Tells whether the code at `start` reads any vector register, or a flag that the code has not
    /// set, before its function returns. Returns `None` if the code uses the x87 stack, which no
    /// stub preserves.
    ///
    /// A function that returns no floating-point value leaves nothing in vector registers that its
    /// caller may read, because the callee may overwrite all of them. The functions with sites are
    /// of this kind. Anything that cannot be decided counts as a read.
    fn is_needed_after(self, start: u64) -> Option<bool> {
        let mut factory = InstructionInfoFactory::new();
        let mut seen: Vec<(u64, bool)> = Vec::new();
        let mut paths = vec![(start, false)];
        let mut needed = false;
        while let Some((at, mut flags_are_set)) = paths.pop() {
            if seen.contains(&(at, flags_are_set)) {
                continue;
            }
            seen.push((at, flags_are_set));
            let instruction = match self.instruction_at(at) {
                Some(instruction) if seen.len() <= LOOK_AHEAD => instruction,
                _ => return Some(true),
            };
            for used in factory.info(&instruction).used_registers() {
                let register = used.register();
                if register.is_st() || register.is_mm() {
                    return None;
                }
                needed |= (register.is_vector_register() || register.is_k())
                    && used.access() != OpAccess::Write;
            }
            needed |= !flags_are_set && instruction.rflags_read() & STATUS != 0;
            flags_are_set |= instruction.rflags_modified() & STATUS == STATUS;
            match instruction.flow_control() {
                FlowControl::Return | FlowControl::Interrupt | FlowControl::Exception => {}
                FlowControl::Next => paths.push((instruction.next_ip(), flags_are_set)),
                // `syscall` itself.
                FlowControl::Call if instruction.code() == Code::Syscall => {
                    paths.push((instruction.next_ip(), flags_are_set))
                }
                FlowControl::UnconditionalBranch => {
                    paths.push((instruction.near_branch64(), flags_are_set))
                }
                FlowControl::ConditionalBranch => {
                    paths.push((instruction.near_branch64(), flags_are_set));
                    paths.push((instruction.next_ip(), flags_are_set));
                }
                // A call reads vector registers as arguments. The target of any other jump is
                // unknown.
                _ => needed = true,
            }
        }
        Some(needed)
    }
}

/// How many instructions before a `syscall` are searched for the system call number.
const REACH: usize = 8;
/// How many bytes of moved code fit into a trampoline.
const MAX_MOVED: u64 = 48;
/// How many instructions after a site are examined. If they do not decide, everything is preserved.
const LOOK_AHEAD: usize = 100;
const STATUS: u32 = Flags::OF | Flags::SF | Flags::ZF | Flags::AF | Flags::CF | Flags::PF;

/// Tells whether five bytes are `mov $number, %eax` with the number of a hooked call.
fn sets_number(code: &[u8]) -> bool {
    let &[0xb8, ref number @ ..] = code else {
        return false;
    };
    let number = number
        .try_into()
        .map(|number| libc::c_long::from(u32::from_le_bytes(number)));
    number.is_ok_and(|number| CALLS.iter().any(|call| call.0 == number))
}

/// Returns the target of a direct jump or call.
fn branches_to(instruction: &Instruction) -> Option<u64> {
    (instruction.op0_kind() == OpKind::NearBranch64).then(|| instruction.near_branch64())
}

/// Tells whether an instruction does the same at another address.
fn can_move(instruction: &Instruction) -> bool {
    !instruction.is_ip_rel_memory_operand() && instruction.flow_control() == FlowControl::Next
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hook::glibc::starts;

    const AT: u64 = 0x1000;

    fn sites(bytes: &[u8]) -> Vec<Found> {
        Code64 { bytes, start: AT }.sites(Starts::default(), |_| false)
    }

    #[test]
    fn the_shape_of_glibc_is_found_and_needs_nothing_kept() {
        // mov $11, %eax; syscall; cmp $-4095, %rax; jae 1f; ret; 1: neg %eax; ret
        let code = b"\xb8\x0b\0\0\0\x0f\x05\x48\x3d\x01\xf0\xff\xff\x73\x01\xc3\xf7\xd8\xc3";
        let expected = Found {
            address: AT,
            syscall: AT + 5,
            number: Some(11),
            keep: Keep::Nothing,
        };
        assert_eq!(sites(code), [expected]);
    }

    #[test]
    fn instructions_of_a_site_are_moved_if_possible() {
        // mov $11, %eax; xor %edx, %edx; syscall; ret
        assert_eq!(sites(b"\xb8\x0b\0\0\0\x31\xd2\x0f\x05\xc3").len(), 1);
        // mov $11, %eax; mov 0(%rip), %rdx; syscall; ret
        assert_eq!(sites(b"\xb8\x0b\0\0\0\x48\x8b\x15\0\0\0\0\x0f\x05\xc3"), []);
        // mov $11, %eax; mov %edx, %eax; syscall; ret
        assert_eq!(sites(b"\xb8\x0b\0\0\0\x89\xd0\x0f\x05\xc3"), []);
    }

    #[test]
    fn other_numbers_and_jumps_past_the_patch_are_left_alone() {
        assert_eq!(sites(b"\xb8\x27\0\0\0\x0f\x05\xc3"), [], "getpid");
        // mov $11, %eax; syscall; jmp to the syscall
        assert_eq!(sites(b"\xb8\x0b\0\0\0\x0f\x05\xeb\xfc"), []);
    }

    #[test]
    fn a_site_is_found_wherever_it_stands() {
        for count in 0..200 {
            let code = behind(count, b"\xb8\x0b\0\0\0\x0f\x05");
            assert_eq!(sites(&code).len(), 1, "behind {count} others");
        }
    }

    /// Returns `code` after `count` no-op instructions.
    fn behind(count: usize, code: &[u8]) -> Vec<u8> {
        [&vec![0x90; count], code].concat()
    }

    #[test]
    fn jumps_from_code_that_is_not_decoded_are_seen() {
        // mov $11, %eax; syscall; ret
        let site = b"\xb8\x0b\0\0\0\x0f\x05\xc3";
        const FAR: i32 = 0x1000;
        let to = |distance: i32| (distance - 5).to_le_bytes();
        let with = |first: &[u8]| {
            let mut code = behind(FAR as usize, site);
            code[..first.len()].copy_from_slice(first);
            let table = starts::tests::section(starts::tests::USUAL, &[0, 0x800]);
            Code64 {
                bytes: &code,
                start: AT,
            }
            .sites(Starts::parse(&table, AT), |_| false)
            .len()
        };
        let jump = |opcode: u8, distance: i32| [&[opcode][..], &to(distance)].concat();
        assert_eq!(with(&[]), 1);
        assert_eq!(
            with(&jump(0xe9, FAR)),
            1,
            "to the instruction that is replaced"
        );
        assert_eq!(with(&jump(0xe9, FAR + 5)), 0, "to the `syscall`");
        assert_eq!(with(&jump(0xe8, FAR + 1)), 0, "into the instruction");
        assert_eq!(
            with(&[&[0x0f, 0x84][..], &(FAR + 5 - 6).to_le_bytes()].concat()),
            0,
            "on a condition"
        );
        assert_eq!(
            with(&jump(0xb8, FAR + 5)),
            1,
            "a number that looks like a distance"
        );
    }

    #[test]
    fn a_vector_register_or_a_flag_that_is_read_is_kept() {
        let keep = |code: &[u8]| sites(code)[0].keep;
        // mov $11, %eax; syscall; movups %xmm0, (%rdi); ret
        assert_eq!(keep(b"\xb8\x0b\0\0\0\x0f\x05\x0f\x11\x07\xc3"), Keep::All);
        // mov $11, %eax; syscall; je +0; ret
        assert_eq!(keep(b"\xb8\x0b\0\0\0\x0f\x05\x74\0\xc3"), Keep::All);
        // mov $11, %eax; syscall; call somewhere
        assert_eq!(keep(b"\xb8\x0b\0\0\0\x0f\x05\xe8\0\0\0\0\xc3"), Keep::All);
        // mov $11, %eax; syscall; fld %st(0); ret
        assert_eq!(sites(b"\xb8\x0b\0\0\0\x0f\x05\xd9\xc0\xc3"), []);
    }

    #[test]
    fn a_call_whose_number_only_the_caller_knows() {
        // mov %rdi, %rax; mov 8(%rsp), %r9; syscall; cmp $-4095, %rax; ret
        let code = b"\x48\x89\xf8\x4c\x8b\x4c\x24\x08\x0f\x05\x48\x3d\x01\xf0\xff\xff\xc3";
        let found = Code64 {
            bytes: code,
            start: AT,
        }
        .sites(Starts::default(), |at| at == AT + 8);
        assert_eq!(
            found,
            [Found {
                address: AT + 3,
                syscall: AT + 8,
                number: None,
                keep: Keep::Nothing
            }]
        );
        assert_eq!(sites(code), []);
    }
}
