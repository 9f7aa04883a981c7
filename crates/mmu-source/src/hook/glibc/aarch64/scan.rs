//! Finds the instructions in a module's code that make a memory call.
//!
//! glibc makes a system call as `mov x8, #number` (`movz`, 64 or 32 bits wide) and, a few
//! instructions later, `svc #0`.

use super::super::handler::CALLS;
use super::super::starts::Starts;

/// An instruction that can be patched: a *site*.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::hook::glibc) struct Found {
    /// The address of the `svc` instruction.
    pub(in crate::hook::glibc) address: u64,
    /// The system call number. `None` in `syscall(2)`, where only the caller knows the number.
    pub(in crate::hook::glibc) number: Option<u32>,
}

impl Found {
    /// Returns the address where the code continues after the call.
    pub(super) fn resume(&self) -> u64 {
        self.address + INSTRUCTION as u64
    }
}

/// An executable segment, as it is in memory.
#[derive(Debug, Clone, Copy)]
pub(in crate::hook::glibc) struct Code64<'a> {
    pub(in crate::hook::glibc) bytes: &'a [u8],
    pub(in crate::hook::glibc) start: u64,
}

impl Code64<'_> {
    /// Finds all sites. `starts` has the starts of functions. `is_generic` tells whether an address
    /// is in `syscall(2)`.
    ///
    /// Data could look like a site. But a site needs a `mov` of a hooked number a few instructions
    /// before the `svc`, which data hardly ever contains.
    pub(in crate::hook::glibc) fn sites(
        self,
        starts: Starts<'_>,
        is_generic: impl Fn(u64) -> bool,
    ) -> Vec<Found> {
        let is_hooked = |number: u32| CALLS.iter().any(|call| call.0 == number.into());
        self.sites_of(starts, is_hooked, is_generic)
    }

    fn sites_of(
        self,
        starts: Starts<'_>,
        is_hooked: impl Fn(u32) -> bool,
        is_generic: impl Fn(u64) -> bool,
    ) -> Vec<Found> {
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let mut found = Vec::new();
        for (index, bytes) in self.bytes.chunks_exact(INSTRUCTION).enumerate() {
            if word(bytes) != SVC {
                continue;
            }
            let offset = index * INSTRUCTION;
            let address = self.start + offset as u64;
            let function = starts.at_or_before(address).unwrap_or(0).max(self.start);
            let begin = (function - self.start) as usize;
            let number = self.bytes[begin..offset]
                .rchunks_exact(INSTRUCTION)
                .map(word)
                .take(REACH)
                .take_while(|word| !leaves(*word))
                .find_map(number_set_by);
            let is_ours = match number {
                Some(number) => is_hooked(number),
                None => is_generic(address),
            };
            if is_ours {
                found.push(Found { address, number });
            }
        }
        found
    }
}

/// The size of an instruction.
const INSTRUCTION: usize = 4;
/// `svc #0`.
pub(super) const SVC: u32 = 0xd400_0001;
/// `bti c`, the landing pad at a function's entry, where an indirect call may land.
pub(super) const BTI_C: u32 = 0xd503_245f;
/// How many instructions before an `svc` are searched for the system call number.
const REACH: usize = 16;

/// Returns the number that an instruction loads into `x8`: `movz x8, #number` or `movz w8,
/// #number`.
fn number_set_by(word: u32) -> Option<u32> {
    const MOVZ_X8: u32 = 0xd280_0008;
    const NUMBER: u32 = 0xffff << 5;
    const WIDE: u32 = 1 << 31;
    (word & !NUMBER | WIDE == MOVZ_X8).then_some((word & NUMBER) >> 5)
}

/// Tells whether the number in `x8` is lost after this instruction: it is a call, a return, an
/// unconditional jump, or another `svc`.
fn leaves(word: u32) -> bool {
    let is_branch = word & 0x7c00_0000 == 0x1400_0000; // b, bl
    let is_by_register = word & 0xfe00_0000 == 0xd600_0000; // br, blr, ret, and with signatures
    is_branch || is_by_register || word == SVC
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hook::glibc::starts;

    const AT: u64 = 0x1000;

    fn code(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    const MUNMAP: u32 = 215;

    fn find(words: &[u32], starts: Starts<'_>, generic: Option<u64>) -> Vec<(u64, Option<u32>)> {
        let bytes = code(words);
        let code = Code64 {
            bytes: &bytes,
            start: AT,
        };
        code.sites_of(starts, |number| number == MUNMAP, |at| Some(at) == generic)
            .iter()
            .map(|site| (site.address - AT, site.number))
            .collect()
    }

    fn sites(words: &[u32]) -> Vec<(u64, Option<u32>)> {
        find(words, Starts::default(), None)
    }

    // From GNU as 2.44.
    const MOV_X8_MUNMAP: u32 = 0xd280_1ae8;
    const MOV_W8_MUNMAP: u32 = 0x5280_1ae8;
    const MOV_X8_GETPID: u32 = 0xd280_1588;
    const MOV_X9_MUNMAP: u32 = 0xd280_1ae9;
    const MOVK_X8_MUNMAP: u32 = 0xf280_1ae8;
    const MOV_X8_MUNMAP_LSL_16: u32 = 0xd2a0_1ae8;
    const MOV_X8_X1: u32 = 0xaa01_03e8;
    const MOV_X1_X2: u32 = 0xaa02_03e1;
    const RET: u32 = 0xd65f_03c0;
    const RETAA: u32 = 0xd65f_0bff;
    const BL: u32 = 0x9400_0001;
    const B: u32 = 0x1400_0001;
    const BLR_X3: u32 = 0xd63f_0060;
    const CBZ_X0: u32 = 0xb400_0040;
    const B_HI: u32 = 0x5400_0068;
    const CMN: u32 = 0xb140_041f;

    #[test]
    fn the_shape_of_glibc_is_found() {
        let shape = [BTI_C, MOV_X8_MUNMAP, SVC, CMN, B_HI, RET];
        assert_eq!(sites(&shape), [(8, Some(MUNMAP))]);
        let between = [MOV_W8_MUNMAP, MOV_X1_X2, CBZ_X0, SVC, RET];
        assert_eq!(sites(&between), [(12, Some(MUNMAP))]);
    }

    #[test]
    fn other_numbers_and_other_instructions_are_left_alone() {
        for first in [
            MOV_X8_GETPID,
            MOV_X9_MUNMAP,
            MOVK_X8_MUNMAP,
            MOV_X8_MUNMAP_LSL_16,
            MOV_X8_X1,
        ] {
            assert_eq!(sites(&[first, SVC, RET]), [], "{first:x}");
        }
        assert_eq!(sites(&[MOV_X8_MUNMAP, RET]), []);
    }

    #[test]
    fn a_number_does_not_outlive_a_call_or_a_jump() {
        for between in [BL, B, BLR_X3, RET, RETAA, SVC] {
            let words = [MOV_X8_MUNMAP, between, MOV_X1_X2, SVC];
            let last = sites(&words).iter().any(|(at, _)| *at == 12);
            assert!(!last, "{between:x}");
        }
    }

    #[test]
    fn a_number_is_looked_for_in_the_function_only() {
        let words = [MOV_X8_MUNMAP, MOV_X1_X2, SVC];
        let table = |second| starts::tests::section(starts::tests::USUAL, &[0, second]);
        let with = |second| find(&words, Starts::parse(&table(second), AT), None);
        assert_eq!(with(12), [(8, Some(MUNMAP))]);
        assert_eq!(with(4), []);
    }

    #[test]
    fn a_call_whose_number_only_the_caller_knows() {
        let words = [MOV_X8_X1, MOV_X1_X2, SVC, RET];
        assert_eq!(find(&words, Starts::default(), Some(AT + 8)), [(8, None)]);
    }
}
