//! The system calls of the broker that have no safe wrapper.
//!
//! # Safety
//! The calls get pointers to locals and the sizes of those locals.

#![allow(
    unsafe_code,
    reason = "calls without a safe wrapper; see the Safety section"
)]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

/// Returns the credentials of the process at the other end, at the time of its `connect` or
/// `listen`.
///
/// rustix has a wrapper, but its pid type cannot be zero. The kernel reports zero for a process
/// outside this pid namespace.
pub(super) fn peer_credentials(socket: &OwnedFd) -> io::Result<libc::ucred> {
    let mut creds = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut bytes = size_of_val(&creds) as libc::socklen_t;
    let (socket, into) = (socket.as_raw_fd(), (&raw mut creds).cast());
    // SAFETY: the kernel writes at most `bytes`, the size of the local, and any bytes are a valid
    // `ucred`.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            into,
            &mut bytes,
        )
    };
    if result == 0 {
        Ok(creds)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns the supplementary groups of the process at the other end, at the time of its `connect`.
pub(super) fn peer_groups(socket: &OwnedFd) -> io::Result<Vec<u32>> {
    const SO_PEERGROUPS: i32 = 59;
    let mut groups = vec![0_u32; 64];
    loop {
        let mut bytes = size_of_val(groups.as_slice()) as libc::socklen_t;
        let (socket, into) = (socket.as_raw_fd(), groups.as_mut_ptr().cast());
        // SAFETY: the call gets the size of the buffer and writes at most that many bytes. Any
        // bytes are valid numbers.
        let result =
            unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, SO_PEERGROUPS, into, &mut bytes) };
        let count = bytes as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // The call reports the size that it needs.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// Returns the group id of the group with this name, or `None` if there is none.
pub(super) fn group_named(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    let mut buffer = vec![0; 1024];
    loop {
        let mut group = MaybeUninit::<libc::group>::uninit();
        let mut found = ptr::null_mut();
        let (into, room) = (buffer.as_mut_ptr(), buffer.len());
        // SAFETY: the name ends in a zero byte, `room` is the length of the buffer, and the other
        // pointers are to locals.
        let error =
            unsafe { libc::getgrnam_r(name.as_ptr(), group.as_mut_ptr(), into, room, &mut found) };
        match error {
            // SAFETY: the call has found the group, so it has initialised the local.
            0 => return Ok((!found.is_null()).then(|| unsafe { group.assume_init() }.gr_gid)),
            libc::ERANGE => buffer.resize(2 * room, 0),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Takes the listening descriptor that a service manager has passed to this process (`LISTEN_FDS`),
/// if there is one.
pub(super) fn take_passed() -> io::Result<Option<OwnedFd>> {
    const FIRST: i32 = 3;
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let value = |name| {
        std::env::var(name)
            .ok()
            .and_then(|value| value.parse::<u32>().ok())
    };
    if value("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match value("LISTEN_FDS") {
        None | Some(0) => return Ok(None),
        Some(1) => {}
        Some(count) => {
            return Err(io::Error::other(format!(
                "{count} were passed, and a broker listens at one"
            )));
        }
    }
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::Error::other("it has been taken already"));
    }
    // SAFETY: takes integers.
    if unsafe { libc::fcntl(FIRST, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `from_raw_fd` needs an open descriptor without another owner. The service manager
    // opened this one for the process with this pid, and `TAKEN` lets one call of this process come
    // here.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(FIRST) }))
}

/// Raises this process's limit of descriptors to its maximum.
pub(super) fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call writes to a local.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the call reads a local.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    }
}

/// Tells whether `exec` gave this program privileges that its caller lacks. Then the environment
/// comes from a caller that must not be trusted.
pub(super) fn is_privileged_by_exec() -> bool {
    // SAFETY: takes an integer.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

pub(super) fn effective_user() -> u32 {
    // SAFETY: takes no arguments and cannot fail.
    unsafe { libc::geteuid() }
}
