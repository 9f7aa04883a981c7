//! What a file with capabilities (`setcap`) lends to the person who runs it.
//!
//! Such a program starts with rights that its user lacks, and *not dumpable*: its `/proc/self/mem`
//! and `pagemap` are root's, and no process of the same user may trace it or the child that it
//! forks.

use std::io;

use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Which of the rights that this program's file has a command keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// None: it does what its user may do. It reads, traces or starts what its user names.
    None,
    /// None, also in programs that it executes, itself among them.
    NoneInChildren,
    /// All, to probe sources. A process without these rights still cannot trace this one: the
    /// kernel compares capabilities as well (ptrace(2), "Ptrace access mode checking").
    Keep,
}

/// Gives up what `rights` does not keep. Before there is a second thread. Root has lent itself
/// nothing: a security module may say that a program of root's is a privileged one, too.
///
/// A program that this one executes gets none of a file's capabilities in any case: they are
/// neither inheritable nor ambient.
///
/// # Errors
/// The rights cannot be given up.
pub(crate) fn limit(rights: Rights) -> io::Result<()> {
    // SAFETY: it takes a number, and reads what the kernel has told this program at its start.
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
    // Nothing was read with these rights so far. Where this fails, `trace` says what is refused.
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable);
    Ok(())
}
