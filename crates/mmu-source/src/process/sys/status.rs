//! The status of one task that has ended, whichever thread of this process traces it.

use std::mem::MaybeUninit;

use super::super::{ExitStatus, Pid};

/// Takes the status of a child or tracee of any thread of this process, if it has ended.
///
/// A stop of it is left alone: the kernel reports those of tracees also if they are not asked for,
/// and reporting takes them.
pub(in super::super) fn take_status(tid: Pid) -> Option<ExitStatus> {
    status(tid, libc::WNOWAIT)?;
    status(tid, 0)
}

fn status(tid: Pid, flags: libc::c_int) -> Option<ExitStatus> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOHANG | libc::__WALL | flags;
    // SAFETY: writes one `siginfo_t` to a local.
    if unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, info.as_mut_ptr(), options) } != 0 {
        return None;
    }
    // SAFETY: it was zeroed, which is a valid value, and then written by the kernel.
    let info = unsafe { info.assume_init() };
    // SAFETY: `waitid` fills in the fields of a child's signal, or leaves all of it zero.
    let status = unsafe { info.si_status() };
    match info.si_code {
        libc::CLD_EXITED => Some(ExitStatus::Code(status)),
        libc::CLD_KILLED | libc::CLD_DUMPED => Some(ExitStatus::Signal(status)),
        _ => None,
    }
}
