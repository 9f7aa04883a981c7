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

/// On x86-64, unwinds a function by the code that runs next. Here such functions have a
/// frame pointer.
pub(crate) fn leave(
    _: &[u8],
    _: &mut UnwindRegsAarch64,
    _: &mut impl FnMut(u64) -> Result<u64, ()>,
) -> Option<u64> {
    None
}
