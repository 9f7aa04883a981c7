//! The memory of a stopped task.

use std::ffi::c_long;
use std::{io, ptr};

use super::super::Pid;

/// Reads up to `buffer.len()` bytes of a tracee's memory and returns how many: fewer if the rest is
/// not mapped.
///
/// # Errors
/// If the memory may not be read: a tracee that is not dumpable is closed to a tracer without
/// `CAP_SYS_PTRACE`.
pub(in super::super) fn read_memory(
    tid: Pid,
    address: u64,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let Ok(base) = usize::try_from(address) else {
        return Ok(0);
    };
    let local = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let remote = libc::iovec {
        iov_base: ptr::without_provenance_mut(base),
        iov_len: buffer.len(),
    };
    // SAFETY: the kernel writes at most `iov_len` bytes to `local`, which is `buffer`, borrowed
    // exclusively. The remote address is checked by the kernel.
    let read = unsafe { libc::process_vm_readv(tid, &local, 1, &remote, 1, 0) };
    if let Ok(read) = usize::try_from(read) {
        return Ok(read);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EFAULT) {
        return Ok(0);
    }
    // A kernel without that call, or a security module that forbids only that.
    match peek(tid, address, buffer) {
        0 => Err(error),
        read => Ok(read),
    }
}

/// The same word by word.
fn peek(tid: Pid, address: u64, buffer: &mut [u8]) -> usize {
    let mut read = 0;
    for (chunk, address) in buffer
        .chunks_mut(size_of::<c_long>())
        .zip((address..).step_by(size_of::<c_long>()))
    {
        let mut word: c_long = 0;
        let out = (&raw mut word).addr();
        // SAFETY: the raw call, unlike the wrapper of libc, writes one word to the address given,
        // which is `word`.
        let result =
            unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKDATA, tid, address, out) };
        if result == -1 {
            break;
        }
        chunk.copy_from_slice(&word.to_ne_bytes()[..chunk.len()]);
        read += chunk.len();
    }
    read
}
