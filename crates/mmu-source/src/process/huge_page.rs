//! Tells whether a file that a task has open is on hugetlbfs.

use std::ffi::CString;
use std::io;

use super::{Pid, sys};
use crate::procfs;

/// Returns the page size of the file that task `tid` has open as `fd`, if the file is on hugetlbfs.
///
/// # Errors
/// If the task's descriptors cannot be read.
pub(super) fn of(tid: Pid, fd: i32) -> io::Result<Option<u64>> {
    let path = CString::new(procfs::of(tid, &format!("fd/{fd}"))?)?;
    match sys::huge_page(&path) {
        // The kernel will refuse the call.
        Err(error) if procfs::lacks_descriptor(tid, "fd", &error) => Ok(None),
        page => page,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_cannot_be_read_is_an_error() {
        assert!(of(Pid::MAX, 3).is_err());
    }

    #[test]
    fn a_descriptor_that_can_be_seen_not_to_exist_has_none() {
        let own = std::process::id() as Pid;
        assert_eq!(of(own, 100_000).expect("the descriptors can be read"), None);
    }
}
