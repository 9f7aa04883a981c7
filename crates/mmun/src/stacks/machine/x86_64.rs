//! Unwinding on x86-64.

use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use mmu_source::process::Registers;

pub(crate) type Machine<D> = UnwinderX86_64<D>;
pub(crate) type Cache = CacheX86_64;

/// The registers with which unwinding begins.
pub(crate) fn start(registers: &Registers) -> UnwindRegsX86_64 {
    UnwindRegsX86_64::new(registers.ip, registers.sp, registers.bp)
}
