//! System calls by number, so that the tests see exactly the requested calls and none of libc's
//! own.

use std::io;

/// The size of a page.
pub(crate) fn page_size() -> u64 {
    // SAFETY: takes an integer.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 }
}

/// Makes a system call and returns its raw result, `-errno` on failure.
pub(crate) fn call(number: libc::c_long, args: &[u64]) -> i64 {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    let [a, b, c, d, e, f] = all;
    // SAFETY: the program passes addresses of mappings that it made for the call, and no other code
    // uses them.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 {
        -i64::from(io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        result
    }
}

/// Maps private memory at an address that the kernel chooses.
pub(crate) fn map(length: u64, protection: i32) -> u64 {
    mmap(
        0,
        length,
        protection,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    )
}

pub(crate) fn mmap(address: u64, length: u64, protection: i32, flags: i32) -> u64 {
    let result = call(
        libc::SYS_mmap,
        &[
            address,
            length,
            protection as u64,
            flags as u64,
            u64::MAX,
            0,
        ],
    );
    assert!(result > 0, "mmap: {result}");
    result as u64
}

pub(crate) fn munmap(address: u64, length: u64) -> i64 {
    call(libc::SYS_munmap, &[address, length])
}

/// Writes to every page.
pub(crate) fn touch(address: u64, length: u64) {
    for page in (address..address + length).step_by(page_size() as usize) {
        // SAFETY: the callers have mapped this memory as writable, and no other code uses it.
        unsafe { std::ptr::with_exposed_provenance_mut::<u8>(page as usize).write_volatile(1) };
    }
}

/// Returns the address of a value that a call writes to.
pub(crate) fn address_mut<T: ?Sized>(value: &mut T) -> u64 {
    std::ptr::from_mut(value).cast::<u8>().expose_provenance() as u64
}

/// Returns the address of a value that a call reads.
pub(crate) fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>().expose_provenance() as u64
}

/// Forks and runs `child` in the new process, which exits with its result.
pub(crate) fn fork(child: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the callers have one thread, or the child makes only system calls.
    match unsafe { libc::fork() } {
        0 => {
            let code = child();
            call(libc::SYS_exit_group, &[code as u64]);
            unreachable!("exit_group returned")
        }
        pid => {
            assert!(pid > 0, "fork: {}", io::Error::last_os_error());
            pid
        }
    }
}

/// Waits for a child and returns its status word.
pub(crate) fn wait(pid: i32, options: i32) -> i32 {
    let mut status = 0;
    loop {
        // SAFETY: writes one int to a local.
        let reaped = unsafe { libc::waitpid(pid, &mut status, options) };
        if reaped == pid {
            return status;
        }
        let error = io::Error::last_os_error();
        assert_eq!(
            error.raw_os_error(),
            Some(libc::EINTR),
            "waitpid on {pid}: {error}"
        );
    }
}
