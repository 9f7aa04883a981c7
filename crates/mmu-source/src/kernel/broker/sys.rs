//! The calls of the broker that have no safe wrapper.
//!
//! # Safety
//! The calls are given pointers to locals, and their sizes.

#![allow(
    unsafe_code,
    reason = "calls without a safe wrapper; see the Safety section"
)]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// The process at the other end, as of its `connect` or `listen`.
///
/// The pid is zero for a process outside of this one's pid namespace, which a type for process
/// numbers that excludes zero cannot hold.
pub(super) fn peer_credentials(socket: &OwnedFd) -> io::Result<libc::ucred> {
    let mut creds = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut bytes = size_of_val(&creds) as libc::socklen_t;
    let (socket, into) = (socket.as_raw_fd(), (&raw mut creds).cast());
    // SAFETY: the local has as many bytes as the call is told, and any bytes are a valid `ucred`.
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

/// The groups of the process at the other end, as of its `connect`, without its effective one.
pub(super) fn peer_groups(socket: &OwnedFd) -> io::Result<Vec<u32>> {
    const SO_PEERGROUPS: i32 = 59;
    let mut groups = vec![0_u32; 64];
    loop {
        let mut bytes = size_of_val(groups.as_slice()) as libc::socklen_t;
        let (socket, into) = (socket.as_raw_fd(), groups.as_mut_ptr().cast());
        // SAFETY: the buffer has as many bytes as the call is told.
        let result =
            unsafe { libc::getsockopt(socket, libc::SOL_SOCKET, SO_PEERGROUPS, into, &mut bytes) };
        let count = bytes as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // The call says how much room it wants.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// Returns the number of a group; `None` if there is none of this name.
pub(super) fn group_named(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    let mut buffer = vec![0; 1024];
    loop {
        let mut group = MaybeUninit::<libc::group>::uninit();
        let mut found = ptr::null_mut();
        let (into, room) = (buffer.as_mut_ptr(), buffer.len());
        // SAFETY: the name ends in a null, the buffer is as long as the call is told, and the rest
        // are places of locals.
        let error =
            unsafe { libc::getgrnam_r(name.as_ptr(), group.as_mut_ptr(), into, room, &mut found) };
        match error {
            // SAFETY: the call has found the group, and so has written it.
            0 => return Ok((!found.is_null()).then(|| unsafe { group.assume_init() }.gr_gid)),
            libc::ERANGE => buffer.resize(2 * room, 0),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

/// Takes the descriptor that a service manager has opened for this process (`LISTEN_FDS`), if it
/// has.
pub(super) fn take_passed() -> io::Result<Option<OwnedFd>> {
    const FIRST: i32 = 3;
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
    // SAFETY: takes integers.
    if unsafe { libc::fcntl(FIRST, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `from_raw_fd` needs an open descriptor without another owner: the service manager
    // has opened it for the process with this pid, and the caller takes it once.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(FIRST) }))
}

/// Lets this process have as many descriptors as it may.
pub(super) fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: fills in a local.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: reads a local.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) };
    }
}

/// Whether this program was given rights that its caller does not have: then the environment is the
/// word of a stranger.
pub(super) fn is_privileged_by_exec() -> bool {
    // SAFETY: takes an integer.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

pub(super) fn effective_user() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}
