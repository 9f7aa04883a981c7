//! Unwinding on aarch64: the innermost function may have its return address in a register, and
//! return addresses may be signed.

use framehop::aarch64::{CacheAarch64, PtrAuthMask, UnwindRegsAarch64, UnwinderAarch64};
use mmu_source::process::Registers;

pub(crate) type Machine<D> = UnwinderAarch64<D>;
pub(crate) type Cache = CacheAarch64;

/// The registers with which unwinding begins.
pub(crate) fn start(registers: &Registers) -> UnwindRegsAarch64 {
    let mask = PtrAuthMask(registers.code_mask);
    let link = registers.link.unwrap_or_default();
    UnwindRegsAarch64::new_with_ptr_auth_mask(mask, link, registers.sp, registers.bp)
}

/// The instruction `ret`.
const RET: u32 = 0xd65f_03c0;

/// Unwinds the innermost function, if it has no unwind tables, by `code`, the code that runs when
/// its system call returns: it computes something, and returns. Then the return address is still in
/// the link register. Returns that address, or `None` if the code does anything else.
///
/// Code that was made at run time can be such a function. It has no frame pointer, so the frame
/// pointer would lead to its caller's caller.
pub(crate) fn leave(
    code: &[u8],
    is_innermost: bool,
    registers: &mut UnwindRegsAarch64,
    _: &mut impl FnMut(u64) -> Result<u64, ()>,
) -> Option<u64> {
    let mut instructions = code.chunks_exact(4).map(|four| {
        let four = four.first_chunk().copied();
        u32::from_le_bytes(four.expect("a chunk has four bytes"))
    });
    let end = instructions.find(|instruction| !computes(*instruction))?;
    (is_innermost && end == RET && registers.lr() != 0).then(|| registers.lr())
}

/// Whether an instruction computes from registers, and writes none of frame pointer, link register
/// and stack pointer.
fn computes(instruction: u32) -> bool {
    let kind = instruction >> 25 & 0b1111;
    (matches!(kind, 0b1000 | 0b1001) || kind & 0b0111 == 0b0101) && instruction & 31 < 29
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The return address of a function that goes on with `code`.
    fn left(code: &[u32], is_innermost: bool) -> Option<u64> {
        let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mask = PtrAuthMask(u64::MAX >> 16);
        let mut registers =
            UnwindRegsAarch64::new_with_ptr_auth_mask(mask, 0x1234_0000_0000_1000, 0, 0);
        leave(&bytes, is_innermost, &mut registers, &mut |_| Err(()))
    }

    #[test]
    fn code_that_only_returns_is_followed() {
        assert_eq!(left(&[RET], true), Some(0x1000));
        // neg x0, x0; mov x1, #0
        assert_eq!(left(&[0xcb00_03e0, 0xd280_0001, RET], true), Some(0x1000));
        assert_eq!(left(&[RET], false), None);
    }

    #[test]
    fn other_code_is_not_followed() {
        // ldp x29, x30, [sp], #16; mov x30, x1; add sp, sp, #16; bl; nop without an end
        for other in [0xa8c1_7bfd, 0xaa01_03fe, 0x9100_43ff, 0x9400_0001] {
            assert_eq!(left(&[other, RET], true), None, "{other:#x}");
        }
        assert_eq!(left(&[], true), None);
        assert_eq!(left(&[0xd280_0001], true), None);
    }
}
