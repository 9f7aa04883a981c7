//! Finds the places in a module's code that make a memory call.
//!
//! glibc makes nearly every one as `mov $number, %eax; syscall`. That `mov` is one instruction of exactly five bytes, as
//! long as a near jump, so no thread can ever stand inside it. A *site* is such an instruction (or another one of at
//! least five bytes) with what follows up to the `syscall`. The code is read by a disassembler from the start of the
//! segment to its end; what cannot be shown to be safe to move is left alone.

use super::handler::CALLS;
use super::stub::Keep;
use iced_x86::RflagsBits as Flags;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register,
};

/// As many bytes are replaced, by a jump.
pub(super) const PATCH: usize = 5;

/// A place that can be patched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Where the instruction stands that is replaced.
    pub(super) address: u64,
    /// Where the `syscall` instruction stands. What lies between runs in the trampoline.
    pub(super) syscall: u64,
    /// Which call it is, or `None` if only the caller knows: `syscall(2)`.
    pub(super) number: Option<u32>,
    /// What is still needed when the call has returned.
    pub(super) keep: Keep,
}

/// One executable segment as it is in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Code64<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) start: u64,
}

impl<'a> Code64<'a> {
    fn decoder(self, at: u64) -> Option<Decoder<'a>> {
        let bytes = self.bytes.get(usize::try_from(at.checked_sub(self.start)?).ok()?..)?;
        Some(Decoder::with_ip(64, bytes, at, DecoderOptions::NONE))
    }

    pub(super) fn instruction_at(self, at: u64) -> Option<Instruction> {
        let instruction = self.decoder(at)?.decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Finds all sites. `is_generic` says of an address whether it is in `syscall(2)`.
    pub(super) fn sites(self, is_generic: impl Fn(u64) -> bool) -> Vec<Found> {
        let mut targets = Vec::new();
        let mut found = Vec::new();
        // What has run before, if nothing jumps: the last few instructions.
        let mut before: Vec<Instruction> = Vec::new();
        for instruction in self.decoder(self.start).into_iter().flatten() {
            if let OpKind::NearBranch64 = instruction.op0_kind() {
                targets.push(instruction.near_branch64());
            }
            if instruction.code() == Code::Syscall {
                found.extend(self.site(&before, instruction, &is_generic));
            }
            // A call comes back, but not to what the code before it left in `rax`.
            if instruction.is_invalid() || instruction.flow_control() != FlowControl::Next {
                before.clear();
            } else {
                if before.len() == REACH {
                    before.remove(0);
                }
                before.push(instruction);
            }
        }
        targets.sort_unstable();
        // Who jumps between the patch and the `syscall` would pass the patch by, or land in it.
        found.retain(|site| {
            let next = targets.partition_point(|target| *target <= site.address);
            targets.get(next).is_none_or(|target| *target > site.syscall)
        });
        found
    }

    fn site(self, before: &[Instruction], syscall: Instruction, is_generic: &impl Fn(u64) -> bool) -> Option<Found> {
        let mut factory = InstructionInfoFactory::new();
        let mut number = None;
        let mut patched = None;
        for instruction in before.iter().rev() {
            if !can_move(instruction) {
                break;
            }
            if instruction.code() == Code::Mov_r32_imm32 && instruction.op0_register() == Register::EAX {
                number = Some(instruction.immediate32());
                patched = Some(instruction);
                break;
            }
            if patched.is_none() && instruction.len() >= PATCH {
                patched = Some(instruction);
            }
            let writes_number = factory.info(instruction).used_registers().iter().any(|used| {
                used.register().full_register() == Register::RAX
                    && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
            });
            if writes_number {
                break;
            }
        }
        let patched = patched.filter(|patched| syscall.ip() - patched.ip() <= MAX_MOVED)?;
        let is_ours = match number {
            Some(number) => patched.len() == PATCH && CALLS.iter().any(|call| call.0 == libc::c_long::from(number)),
            None => is_generic(syscall.ip()),
        };
        if !is_ours {
            return None;
        }
        let keep = match self.is_needed_after(syscall.next_ip())? {
            true => Keep::All,
            false => Keep::Nothing,
        };
        // The test of the number destroys flags.
        if number.is_none() && keep != Keep::Nothing {
            return None;
        }
        Some(Found { address: patched.ip(), syscall: syscall.ip(), number, keep })
    }

    /// Tells whether the code at `start` reads a vector register or a flag that it did not set, before its function returns.
    /// `None` if it uses the x87 stack, which no stub keeps.
    ///
    /// A function that returns no number of floating point leaves no vector register behind that its caller may read: all
    /// of them are the callee's to destroy. The functions with sites are such, and whatever is not clear counts as a read.
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
                needed |= (register.is_vector_register() || register.is_k()) && used.access() != OpAccess::Write;
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
                FlowControl::UnconditionalBranch => paths.push((instruction.near_branch64(), flags_are_set)),
                FlowControl::ConditionalBranch => {
                    paths.push((instruction.near_branch64(), flags_are_set));
                    paths.push((instruction.next_ip(), flags_are_set));
                }
                // A call takes its arguments from vector registers; where the others go is not known.
                _ => needed = true,
            }
        }
        Some(needed)
    }
}

/// How far back from a `syscall` its number is looked for, in instructions.
const REACH: usize = 8;
/// How many bytes a trampoline has room for.
const MAX_MOVED: u64 = 48;
/// How many instructions behind a site are looked at before they count as needing everything.
const LOOK_AHEAD: usize = 100;
const STATUS: u32 = Flags::OF | Flags::SF | Flags::ZF | Flags::AF | Flags::CF | Flags::PF;

/// Tells whether an instruction does the same at another address.
fn can_move(instruction: &Instruction) -> bool {
    !instruction.is_ip_rel_memory_operand() && instruction.flow_control() == FlowControl::Next
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0x1000;

    fn sites(bytes: &[u8]) -> Vec<Found> {
        Code64 { bytes, start: AT }.sites(|_| false)
    }

    #[test]
    fn the_shape_of_glibc_is_found_and_needs_nothing_kept() {
        // mov $11, %eax; syscall; cmp $-4095, %rax; jae 1f; ret; 1: neg %eax; ret
        let code = b"\xb8\x0b\0\0\0\x0f\x05\x48\x3d\x01\xf0\xff\xff\x73\x01\xc3\xf7\xd8\xc3";
        let expected = Found { address: AT, syscall: AT + 5, number: Some(11), keep: Keep::Nothing };
        assert_eq!(sites(code), [expected]);
    }

    #[test]
    fn what_lies_between_is_moved_if_it_can_be() {
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
        let found = Code64 { bytes: code, start: AT }.sites(|at| at == AT + 8);
        assert_eq!(found, [Found { address: AT + 3, syscall: AT + 8, number: None, keep: Keep::Nothing }]);
        assert_eq!(sites(code), []);
    }
}
