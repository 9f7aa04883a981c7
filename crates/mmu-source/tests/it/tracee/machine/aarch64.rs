//! The parts of the tracee that depend on aarch64.

use libc::{c_long, ucontext_t};

/// The call that makes a plain fork here. Its arguments are those of `clone`.
pub(crate) const FORK: c_long = libc::SYS_clone;

/// Makes a handler return to `place`, with a higher stack pointer. The frames that `place` may
/// overwrite are not used any more.
pub(crate) fn return_to(context: &mut ucontext_t, place: extern "C" fn() -> !) {
    let registers = &mut context.uc_mcontext;
    registers.pc = place as *const () as u64;
    registers.sp = (registers.sp + 0x800) & !15;
}
