//! Trampolines for patched `svc` instructions, and for function entries that another library has
//! patched already.
//!
//! A site may expect that every register except `x0` is preserved, so the trampoline of a site
//! pushes the registers that it changes; aarch64 Linux has no red zone. The trampoline of a
//! function entry saves nothing, because a function may change `x9` to `x17`. Patched code reaches
//! a trampoline by a direct branch, which needs no landing pad. The functions that a trampoline
//! calls indirectly begin with a landing pad.

use super::scan::{BTI_C, SVC};

/// The bytes that are reserved for each trampoline.
pub(in crate::hook::glibc) const SLOT: u64 = 80;

/// Returns a branch from `from` to `to`, or `None` if `to` is out of reach.
pub(in crate::hook::glibc) fn branch(from: u64, to: u64) -> Option<[u8; 4]> {
    const B: u32 = 0x1400_0000;
    const BITS: u32 = 26;
    let distance = to.wrapping_sub(from) as i64 / 4;
    let fits = (-(1 << (BITS - 1))..1 << (BITS - 1)).contains(&distance);
    let field = distance as u32 & ((1 << BITS) - 1);
    fits.then(|| (B | field).to_le_bytes())
}

/// Returns the trampoline of a site, to be placed at the address `at`. The trampoline looks up the
/// number of the call in `table`, which has 512 bytes, and calls `stub` if the number is hooked.
/// The trampoline makes any other call itself, with the registers and the stack of the site,
/// because such a call may return twice or on another stack.
///
/// Around the stub, the trampoline keeps a frame record. The functions of libc that make a system
/// call keep none of their own, so without the record an unwinder that follows frame pointers would
/// miss their caller in the stack of a callback.
pub(super) fn of_call(at: u64, stub: u64, table: u64, resume: u64) -> Option<Vec<u8>> {
    const WORDS: [u32; 16] = [
        0xa9bf_47f0, //  0: stp  x16, x17, [sp, #-16]!
        0xd349_fd10, //  4: lsr  x16, x8, #9
        0xb500_0170, //  8: cbnz x16, 52
        0x5800_01b0, // 12: ldr  x16, 64
        0x3868_6a10, // 16: ldrb w16, [x16, x8]
        0x3400_0110, // 20: cbz  w16, 52
        0xa9bf_7bfd, // 24: stp  x29, x30, [sp, #-16]!
        0x9100_03fd, // 28: mov  x29, sp
        0x5800_0150, // 32: ldr  x16, 72
        0xd63f_0200, // 36: blr  x16
        0xa8c1_7bfd, // 40: ldp  x29, x30, [sp], #16
        0xa8c1_47f0, // 44: ldp  x16, x17, [sp], #16
        0,           // 48: b    resume
        0xa8c1_47f0, // 52: ldp  x16, x17, [sp], #16
        SVC,         // 56: svc  #0
        0,           // 60: b    resume
    ];
    let mut code: Vec<u8> = WORDS.iter().flat_map(|word| word.to_le_bytes()).collect();
    for place in [48, 60] {
        code[place..place + 4].copy_from_slice(&branch(at + place as u64, resume)?);
    }
    code.extend(table.to_le_bytes());
    code.extend(stub.to_le_bytes());
    Some(code)
}

/// Returns the trampoline for the entry of a function. The trampoline jumps to `stub` with the
/// number in `x9` and the function to call in `x10`.
pub(super) fn of_function(number: u32, stub: u64, foreign: Foreign) -> Vec<u8> {
    const WORDS: [u32; 4] = [
        0x1800_0089, //  0: ldr w9, 16
        0x5800_00aa, //  4: ldr x10, 24
        0x5800_00d0, //  8: ldr x16, 32
        0xd61f_0200, // 12: br  x16
    ];
    let mut code: Vec<u8> = WORDS.iter().flat_map(|word| word.to_le_bytes()).collect();
    for value in [number.into(), foreign.target, stub] {
        code.extend(value.to_le_bytes());
    }
    code
}

/// A jump that another library has written at the entry of a function. The hook replaces only the
/// first instruction of the jump, because a thread may be about to execute the second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hook::glibc) struct Foreign {
    /// The address of the jump's first instruction.
    at: u64,
    target: u64,
}

impl Foreign {
    /// How many bytes of a function are examined.
    pub(in crate::hook::glibc) const LENGTH: usize = 24;

    /// Reads the jump at `entry`, or after a landing pad at `entry`. The jump is either a branch,
    /// or instructions that load an address into a register and branch to that address.
    pub(in crate::hook::glibc) fn read(entry: u64, code: [u8; Self::LENGTH]) -> Option<Self> {
        let words: Vec<u32> = code
            .chunks_exact(4)
            .map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")))
            .collect();
        let skipped = usize::from(words[0] == BTI_C);
        let at = entry + 4 * skipped as u64;
        let words = &words[skipped..];
        let target = branch_target(at, words[0])
            .or_else(|| moved_target(words))
            .or_else(|| literal_target(words))?;
        Some(Self { at, target })
    }

    /// Returns the address of the instruction to replace.
    pub(in crate::hook::glibc) fn place(&self, _: u64) -> u64 {
        self.at
    }
}

/// `b target`.
fn branch_target(at: u64, word: u32) -> Option<u64> {
    // The distance is in instructions: 26 bits, signed.
    let distance = i64::from((word << 6) as i32 >> 6) * 4;
    (word & 0xfc00_0000 == 0x1400_0000).then(|| at.wrapping_add_signed(distance))
}

/// `movz x15, ..., movk x15, ..., br x15`, as UCX and libfabric write it, but with any register.
fn moved_target(words: &[u32]) -> Option<u64> {
    const MOVE: u32 = 0xff80_0000;
    const MOVZ: u32 = 0xd280_0000;
    const MOVK: u32 = 0xf280_0000;
    let register = words[0] & 0x1f;
    let mut target = 0;
    for (index, word) in words.iter().enumerate() {
        if *word == br(register) && index > 0 {
            return Some(target);
        }
        let wanted = if index == 0 { MOVZ } else { MOVK };
        if word & MOVE != wanted || word & 0x1f != register {
            return None;
        }
        let shift = 16 * (word >> 21 & 3);
        target = target & !(0xffff << shift) | u64::from(word >> 5 & 0xffff) << shift;
    }
    None
}

/// `ldr x17, .+8; br x17` followed by the address, with any register.
fn literal_target(words: &[u32]) -> Option<u64> {
    const LDR_8_ON: u32 = 0x5800_0040;
    let register = words[0] & 0x1f;
    (words[0] & !0x1f == LDR_8_ON && words[1] == br(register))
        .then(|| u64::from(words[2]) | u64::from(words[3]) << 32)
}

/// `br register`.
fn br(register: u32) -> u32 {
    0xd61f_0000 | register << 5
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0x7f00_0000_1000;

    #[test]
    fn a_branch_reaches_128_mib_either_way() {
        // Assembled by GNU as: b .+4, b .-4.
        assert_eq!(branch(AT, AT + 4), Some(0x1400_0001_u32.to_le_bytes()));
        assert_eq!(branch(AT, AT - 4), Some(0x17ff_ffff_u32.to_le_bytes()));
        let far = 128 << 20;
        for to in [AT + far - 4, AT - far] {
            let word = u32::from_le_bytes(branch(AT, to).expect("it is in reach"));
            assert_eq!(branch_target(AT, word), Some(to));
        }
        assert_eq!(branch(AT, AT + far), None);
        assert_eq!(branch(AT, AT - far - 4), None);
    }

    #[test]
    fn a_trampoline_goes_back_and_fits() {
        let code = of_call(AT, 0x1111, 0x2222, AT + 0x5000).expect("it is in reach");
        assert_eq!(code.len() as u64, SLOT);
        let word = |at: usize| u32::from_le_bytes(code[at..at + 4].try_into().expect("four"));
        for place in [48, 60] {
            assert_eq!(
                branch_target(AT + place as u64, word(place)),
                Some(AT + 0x5000)
            );
        }
        assert_eq!(code[64..72], 0x2222_u64.to_le_bytes());
        assert_eq!(code[72..80], 0x1111_u64.to_le_bytes());
        assert_eq!(of_call(AT, 0, 0, AT + (128 << 20) + 48), None);
        let foreign = Foreign { at: AT, target: 7 };
        let code = of_function(215, 0x1111, foreign);
        let value = |at: usize| u64::from_le_bytes(code[at..at + 8].try_into().expect("eight"));
        assert_eq!((value(16), value(24), value(32)), (215, 7, 0x1111));
        assert!(code.len() as u64 <= SLOT);
    }

    #[test]
    fn the_jumps_of_others_are_read() {
        let read = |words: [u32; 6]| {
            let code: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            Foreign::read(AT, code.try_into().expect("six words"))
        };
        let found = |at, target| Some(Foreign { at, target });
        let far = [
            0xd2e2_468f,
            0xf2cf_000f,
            0xf2a0_002f,
            0xf282_468f,
            0xd61f_01e0,
            0,
        ];
        assert_eq!(read(far), found(AT, 0x1234_7800_0001_1234), "UCX");
        let short = [BTI_C, 0xd282_468f, 0xd61f_01e0, 0, 0, 0];
        assert_eq!(read(short), found(AT + 4, 0x1234), "behind a landing pad");
        assert_eq!(read([0x1400_0001, 0, 0, 0, 0, 0]), found(AT, AT + 4));
        let literal = [0x5800_0051, 0xd61f_0220, 0x89ab_cdef, 0x4567, 0, 0];
        assert_eq!(read(literal), found(AT, 0x4567_89ab_cdef));
        let other_register = [0xd282_468f, 0xd61f_0220, 0, 0, 0, 0];
        assert_eq!(read(other_register), None);
        let glibc = [
            BTI_C,
            0xd280_1ae8,
            SVC,
            0xb140_041f,
            0x5400_0068,
            0xd65f_03c0,
        ];
        assert_eq!(read(glibc), None);
    }
}
