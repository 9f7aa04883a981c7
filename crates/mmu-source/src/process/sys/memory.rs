//! The memory of a stopped task.

use std::ffi::c_long;
use std::{io, ptr};

use super::super::Pid;

/// Reads up to `buffer.len()` bytes of a tracee's memory, and returns how many bytes were read. The
/// read ends at the first byte that is not mapped.
///
/// # Errors
/// If the memory may not be read. If a tracee is not dumpable, only a tracer with `CAP_SYS_PTRACE`
/// may read its memory.
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
    // SAFETY: the kernel writes at most `iov_len` bytes to `local`, which is the exclusively
    // borrowed `buffer`. The kernel checks the remote address.
    let read = unsafe { libc::process_vm_readv(tid, &local, 1, &remote, 1, 0) };
    if let Ok(read) = usize::try_from(read) {
        return Ok(read);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EFAULT) {
        return Ok(0);
    }
    // The kernel lacks `process_vm_readv`, or a security module forbids it. Ptrace may still work.
    match peek(tid, address, buffer) {
        0 => Err(error),
        read => Ok(read),
    }
}

/// Reads memory by `PTRACE_PEEKDATA`, one word at a time.
fn peek(tid: Pid, address: u64, buffer: &mut [u8]) -> usize {
    let mut read = 0;
    for (chunk, address) in buffer
        .chunks_mut(size_of::<c_long>())
        .zip((address..).step_by(size_of::<c_long>()))
    {
        let mut word: c_long = 0;
        let out = (&raw mut word).addr();
        // SAFETY: unlike the wrapper in libc, the raw call writes one word to its last argument,
        // the address of `word`.
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
