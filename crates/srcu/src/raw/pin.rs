//! Keeps this code loaded.
//!
//! The background thread never ends, and threads that are built on this crate end some time after
//! their owner. If a program unloads the library with this code (`dlclose`), such a thread would
//! return into memory that is unmapped, or into a second copy of the library, whose data it would
//! share with that copy's own thread.

use std::mem::MaybeUninit;
use std::ptr;

/// Keeps the library with this code loaded for ever. Does nothing if the code is part of the
/// program itself.
///
/// The loader calls this function when it loads the library. Later, a thread could come here inside
/// the allocator, where it must not wait for the loader's lock.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = pin;

extern "C" fn pin() {
    // SAFETY: the call has no preconditions.
    let program = unsafe { libc::getauxval(libc::AT_PHDR) } as usize;
    let this = module_of(pin as extern "C" fn() as *const libc::c_void);
    let program = module_of(ptr::without_provenance(program));
    let (Some(this), Some(program)) = (this, program) else {
        return;
    };
    if this.dli_fbase == program.dli_fbase {
        return;
    }
    // SAFETY: the call needs a C string, and the name is the loader's own name of a loaded module.
    // So no library is loaded, and no initialiser runs.
    unsafe {
        libc::dlopen(
            this.dli_fname,
            libc::RTLD_LAZY | libc::RTLD_NOLOAD | libc::RTLD_NODELETE,
        )
    };
}

/// Asks the loader to which module an address belongs.
fn module_of(address: *const libc::c_void) -> Option<libc::Dl_info> {
    let mut info = MaybeUninit::<libc::Dl_info>::uninit();
    // SAFETY: the call accepts any address, and needs room for one structure.
    if unsafe { libc::dladdr(address, info.as_mut_ptr()) } == 0 {
        return None;
    }
    // SAFETY: the value must be initialised. The call succeeded, so it has written the value.
    Some(unsafe { info.assume_init() })
}
