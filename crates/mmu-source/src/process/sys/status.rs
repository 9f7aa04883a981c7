//! The exit status of one task, whichever thread of this process traces it.

use std::mem::MaybeUninit;

use super::super::{ExitStatus, Pid};

/// Reaps a child or tracee of any thread of this process, if it has ended, and returns its status.
///
/// The first `waitid` consumes nothing (`WNOWAIT`). The kernel also reports the stops of tracees,
/// although this function does not ask for stops. Without `WNOWAIT`, `waitid` would consume such a
/// stop.
pub(in super::super) fn take_status(tid: Pid) -> Option<ExitStatus> {
    status(tid, libc::WNOWAIT)?;
    status(tid, 0)
}

fn status(tid: Pid, flags: libc::c_int) -> Option<ExitStatus> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOHANG | libc::__WALL | flags;
    // SAFETY: `waitid` writes one `siginfo_t` to a local.
    if unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, info.as_mut_ptr(), options) } != 0 {
        return None;
    }
    // SAFETY: the local was zeroed, which is a valid value, before the kernel wrote to it.
    let info = unsafe { info.assume_init() };
    // SAFETY: `waitid` either fills in the fields of a child's signal or leaves the whole local
    // zero.
    let status = unsafe { info.si_status() };
    match info.si_code {
        libc::CLD_EXITED => Some(ExitStatus::Code(status)),
        libc::CLD_KILLED | libc::CLD_DUMPED => Some(ExitStatus::Signal(status)),
        _ => None,
    }
}
