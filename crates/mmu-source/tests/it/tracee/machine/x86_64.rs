//! The parts of the tracee that depend on x86-64.

use libc::{MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, c_long, ucontext_t};

use crate::script::Script;
use crate::sys::{mmap, page_size, touch};

/// The call that makes a plain fork here. It takes no arguments.
pub(crate) const FORK: c_long = libc::SYS_fork;

/// Makes a handler return to `place`, with a higher stack pointer. The frames that `place` may
/// overwrite are not used any more.
pub(crate) fn return_to(context: &mut ucontext_t, place: extern "C" fn() -> !) {
    let registers = &mut context.uc_mcontext.gregs;
    registers[libc::REG_RIP as usize] = place as *const () as i64;
    registers[libc::REG_RSP as usize] = ((registers[libc::REG_RSP as usize] + 0x800) & !15) - 8;
}

/// Makes a 32-bit system call. Saves `rbx` by hand, because the compiler reserves that register.
fn i386(number: u32, args: [u32; 3]) -> i32 {
    let mut result = u64::from(number);
    // SAFETY: the program passes addresses of mappings that it made for the call. The kernel
    // preserves all registers except r8 to r11, which are declared as overwritten.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {b}", "int 0x80", "xchg rbx, {b}",
            b = inout(reg) u64::from(args[0]) => _,
            inlateout("rax") result, in("rcx") u64::from(args[1]), in("rdx") u64::from(args[2]),
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result as i32
}

/// 32-bit calls of a 64-bit program.
pub(crate) fn compat_calls() {
    const MUNMAP: u32 = 91;
    const MPROTECT: u32 = 125;
    const MADVISE: u32 = 219;
    let low = mmap(
        0,
        8 * page_size(),
        PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | libc::MAP_32BIT,
    );
    touch(low, 8 * page_size());
    let page = page_size() as u32;
    let at = u32::try_from(low).expect("MAP_32BIT maps low memory");
    let mut script = Script::new();
    let call = |number, args| i64::from(i386(number, args));
    script.unmap(
        "munmap",
        low,
        2 * page_size(),
        call(MUNMAP, [at, 2 * page, 0]),
    );
    script.seen(
        "mprotect",
        "protection_vma",
        low + 2 * page_size(),
        page_size(),
        call(MPROTECT, [at + 2 * page, page, 1]),
    );
    script.seen(
        "madvise",
        "clear",
        low + 4 * page_size(),
        page_size(),
        call(MADVISE, [at + 4 * page, page, 4]),
    );
    // This is the number of `munmap` on x86-64. In a 32-bit call the number means another call.
    call(libc::SYS_munmap as u32, [at, page, 0]);
    script.finish();
}
