//! Unwinding on x86-64.

use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use mmu_source::process::Registers;

pub(crate) type Machine<D> = UnwinderX86_64<D>;
pub(crate) type Cache = CacheX86_64;

/// The registers with which unwinding begins.
pub(crate) fn start(registers: &Registers) -> UnwindRegsX86_64 {
    UnwindRegsX86_64::new(registers.ip, registers.sp, registers.bp)
}

/// Unwinds a function without unwind tables by `code`, the code that runs when its callee or system
/// call returns: it restores registers, and returns. Returns the function's own return address, or
/// `None` and unchanged registers if the code does anything else, or memory cannot be read.
///
/// Python's `-X perf` makes such functions (`sub $8,%rsp; call *%rcx; add $8,%rsp; ret`), which
/// have no frame pointer.
pub(crate) fn leave(
    code: &[u8],
    _is_innermost: bool,
    registers: &mut UnwindRegsX86_64,
    read: &mut impl FnMut(u64) -> Result<u64, ()>,
) -> Option<u64> {
    let (mut sp, mut bp, mut rest) = (registers.sp(), registers.bp(), code);
    loop {
        rest = match rest {
            // add $size,%rsp
            [0x48, 0x83, 0xc4, size @ 0..0x80, rest @ ..] => {
                sp = sp.checked_add(u64::from(*size))?;
                rest
            }
            [0x48, 0x81, 0xc4, a, b, c, d @ 0..0x80, rest @ ..] => {
                sp = sp.checked_add(u32::from_le_bytes([*a, *b, *c, *d]).into())?;
                rest
            }
            // leave
            [0xc9, rest @ ..] => {
                sp = Some(bp).filter(|bp| *bp >= sp)?;
                bp = read(sp).ok()?;
                sp = sp.checked_add(8)?;
                rest
            }
            // pop %rbp; pop of another register but %rsp
            [0x5d, rest @ ..] => {
                bp = read(sp).ok()?;
                sp = sp.checked_add(8)?;
                rest
            }
            [0x58..=0x5b | 0x5e | 0x5f, rest @ ..] | [0x41, 0x58..=0x5f, rest @ ..] => {
                sp = sp.checked_add(8)?;
                rest
            }
            [0xc3, ..] => {
                let address = read(sp).ok()?;
                registers.set_ip(address);
                registers.set_sp(sp.checked_add(8)?);
                registers.set_bp(bp);
                return Some(address);
            }
            _ => return None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The return address and the registers `sp` and `bp` after `code`. Each word of the stack is
    /// its own address; `sp` is 0x1000, `bp` 0x1040.
    fn left(code: &[u8]) -> (Option<u64>, u64, u64) {
        let mut registers = UnwindRegsX86_64::new(0x10, 0x1000, 0x1040);
        let address = leave(code, true, &mut registers, &mut |at| Ok(at));
        (address, registers.sp(), registers.bp())
    }

    #[test]
    fn code_that_only_returns_is_followed() {
        assert_eq!(left(&[0xc3]), (Some(0x1000), 0x1008, 0x1040));
        let python = [0x48, 0x83, 0xc4, 8, 0xc3];
        assert_eq!(left(&python), (Some(0x1008), 0x1010, 0x1040));
        let large = [0x48, 0x81, 0xc4, 0, 1, 0, 0, 0x5d, 0xc3];
        assert_eq!(left(&large), (Some(0x1108), 0x1110, 0x1100));
        let pops = [0x5b, 0x41, 0x5c, 0xc3];
        assert_eq!(left(&pops), (Some(0x1010), 0x1018, 0x1040));
        assert_eq!(left(&[0xc9, 0xc3]), (Some(0x1048), 0x1050, 0x1040));
    }

    #[test]
    fn other_code_changes_nothing() {
        for code in [
            &[][..],
            &[0x5d],
            // add $-8,%rsp; pop %rsp; mov %rax,%rdi
            &[0x48, 0x83, 0xc4, 0xf8, 0xc3],
            &[0x5c, 0xc3],
            &[0x5d, 0x48, 0x89, 0xc7, 0xc3],
        ] {
            assert_eq!(left(code), (None, 0x1000, 0x1040), "{code:x?}");
        }
        let mut registers = UnwindRegsX86_64::new(0x10, u64::MAX - 4, 0x1000);
        let mut read = |at| Ok(at);
        for code in [
            &[0xc3][..],
            &[0x5b, 0xc3],
            &[0xc9, 0xc3],
            &[0x48, 0x83, 0xc4, 8, 0xc3],
        ] {
            assert_eq!(leave(code, true, &mut registers, &mut read), None);
        }
    }
}
