//! Limits the capabilities that `setcap` may have given to `mmun`'s file.
//!
//! A program with file capabilities starts with rights that its user lacks. It also starts *not
//! dumpable*: root owns its `/proc/self/mem` and `pagemap`, and no process of the same user may
//! trace it or a child that it forks.

use std::io;

use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Which capabilities of `mmun`'s file a command keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// None: the command reads, traces or starts files and processes that the user names, so it
    /// must not do more than the user may.
    None,
    /// None, not even in programs that it executes, such as a further `mmun`.
    NoneInChildren,
    /// All, to probe sources. A process without these rights still cannot trace this one: the
    /// kernel compares capabilities as well (ptrace(2), "Ptrace access mode checking").
    Keep,
}

/// Gives up the capabilities that `rights` does not keep. Must be called before there is a second
/// thread, because each thread has its own capabilities. For root this does nothing: root has
/// gained no rights, even if a security module sets `AT_SECURE` for root's programs.
///
/// A program that this one executes never gets this file's capabilities, because they are neither
/// inheritable nor ambient.
///
/// # Errors
/// The rights cannot be given up.
pub(crate) fn limit(rights: Rights) -> io::Result<()> {
    // SAFETY: `getauxval` takes an integer, and reads a value that the kernel has passed at the
    // program's start.
    let has_gained = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    if !has_gained || rustix::process::getuid().is_root() {
        return Ok(());
    }
    if rights != Rights::Keep {
        let none = CapabilitySet::empty();
        let inheritable = rustix::thread::capabilities(None).map_or(none, |sets| sets.inheritable);
        let sets = CapabilitySets {
            effective: none,
            permitted: none,
            inheritable,
        };
        rustix::thread::set_capabilities(None, sets)?;
        if rights == Rights::NoneInChildren {
            rustix::thread::set_no_new_privs(true)?;
        }
    }
    // Safe, because this process has read nothing with these rights so far. If this fails, `trace`
    // reports what the kernel refuses.
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable);
    Ok(())
}
