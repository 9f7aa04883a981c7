//! The facts that the handler looks up about its own process, without the allocator, because the
//! handler may run inside `free`.

#![allow(unsafe_code, reason = "tests make descriptors")]

use super::raw::{self, File};
use crate::maps::{self, Mapping};
use crate::ranges::is_self_pidfd;

/// Calls `f` for every mapping of this process, in order of address, until `f` returns `false`.
///
/// # Errors
/// If the mappings cannot be read: too many open files, no `/proc`, a sandbox. The caller must then
/// assume that everything is mapped.
pub(super) fn mappings(mut f: impl FnMut(&Mapping) -> bool) -> Result<(), i32> {
    let file = File::open(b"/proc/self/maps\0")?;
    // A line consists of the columns, at most about 80 bytes, and a path. Only the beginning of the
    // path matters.
    lines(file, |line| {
        maps::parse(line).is_none_or(|mapping| f(&mapping))
    })
}

/// Returns the start of the mapping that contains `address`.
///
/// # Errors
/// The errors of [`mappings`].
pub(super) fn mapping_start(address: u64) -> Result<Option<u64>, i32> {
    let mut found = None;
    mappings(|mapping| {
        if mapping.start <= address && address < mapping.end {
            found = Some(mapping.start);
        }
        mapping.end <= address
    })?;
    Ok(found)
}

/// Returns the end of the last mapping in the user half of the address space.
///
/// # Errors
/// The errors of [`mappings`].
pub(super) fn top() -> Result<u64, i32> {
    const KERNEL_HALF: u64 = 1 << 63;
    let mut top = 0;
    mappings(|mapping| {
        if mapping.end < KERNEL_HALF {
            top = mapping.end;
        }
        true
    })?;
    Ok(top)
}

/// Tells whether `number`, an argument of a call that moves pages, is 0 or the id of a thread of
/// this process. Both name this process.
pub(super) fn is_own_task(number: i32) -> bool {
    number == 0 || raw::is_thread_of(raw::getpid(), number)
}

/// Tells whether a pidfd refers to this process. Returns true if that cannot be determined.
pub(super) fn is_own_pidfd(fd: i32) -> bool {
    if is_self_pidfd(fd) {
        return true;
    }
    if fd < 0 {
        return false;
    }
    const FOLDER: &[u8] = b"/proc/self/fdinfo/";
    let mut path = [0; FOLDER.len() + 11];
    path[..FOLDER.len()].copy_from_slice(FOLDER);
    let digits = fd.checked_ilog10().unwrap_or(0) as usize + 1;
    let mut rest = fd;
    for digit in path[FOLDER.len()..][..digits].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let Ok(file) = File::open(&path[..=FOLDER.len() + digits]) else {
        return true;
    };
    // If `fdinfo` has neither line, the descriptor is not a pidfd.
    let mut number = None;
    let read = lines(file, |line| {
        // `NSpid`, which some kernels lack, comes after `Pid`. The last field of `NSpid` is the pid
        // in the process's own namespace.
        if let Some(numbers) = line
            .strip_prefix(b"Pid:")
            .or_else(|| line.strip_prefix(b"NSpid:"))
        {
            let last = std::str::from_utf8(numbers)
                .ok()
                .and_then(|text| text.split_ascii_whitespace().last());
            number = last.and_then(|text| text.parse::<i32>().ok());
        }
        true
    });
    // A pid below one means that the process has ended, or is not visible from this namespace.
    read.is_err() || number.is_some_and(|number| number > 0 && is_own_task(number))
}

/// Calls `f` for every line until `f` returns `false`. A line is cut off after a kilobyte.
fn lines(mut file: File, mut f: impl FnMut(&[u8]) -> bool) -> Result<(), i32> {
    let mut line = [0_u8; 1024];
    let mut length = 0;
    let mut buffer = [0_u8; 2048];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(libc::EINTR) => continue,
            Err(error) => return Err(error),
        };
        for byte in &buffer[..read] {
            if *byte == b'\n' {
                if !f(&line[..length]) {
                    return Ok(());
                }
                length = 0;
            } else if length < line.len() {
                line[length] = *byte;
                length += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mappings_are_those_that_the_other_reader_finds() {
        let own = mapping_start(mapping_start as *const () as u64).expect("/proc is there");
        let own = own.expect("this function is mapped");
        let all = maps::read(std::process::id() as i32).expect("/proc is there");
        assert!(all.iter().any(|mapping| mapping.start == own));
        assert_eq!(
            top().ok(),
            all.iter()
                .rfind(|mapping| mapping.end < 1 << 63)
                .map(|mapping| mapping.end)
        );
        assert_eq!(mapping_start(0), Ok(None));
    }

    #[test]
    fn every_thread_of_this_process_is_this_process() {
        let own = std::thread::scope(|scope| {
            let (tell, ask) = std::sync::mpsc::channel();
            let (done, wait) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                // SAFETY: takes no arguments, and returns the id of this thread.
                let _ = tell.send(unsafe { libc::gettid() });
                let _ = wait.recv();
            });
            let is_own = is_own_task(ask.recv().expect("the thread tells"));
            drop(done);
            is_own
        });
        assert!(own && is_own_task(0) && is_own_task(std::process::id() as i32));
        assert!(!is_own_task(1) && !is_own_task(-1) && !is_own_task(i32::MAX));
    }

    #[test]
    fn every_number_that_the_kernel_takes_for_this_process_is_known() {
        let size = crate::page::size() as usize;
        let page = vec![0_u8; 2 * size];
        let start = page.as_ptr().addr().next_multiple_of(size);
        let vector = libc::iovec {
            iov_base: std::ptr::without_provenance_mut(start),
            iov_len: size,
        };
        for fd in (-10_100..-9_900).chain([-20_000]) {
            // SAFETY: the vector is live, and the advice does not change the memory.
            let advised = unsafe {
                libc::syscall(
                    libc::SYS_process_madvise,
                    fd,
                    &raw const vector,
                    1_usize,
                    libc::MADV_WILLNEED,
                    0,
                )
            };
            assert!(advised == -1 || is_own_pidfd(fd), "{fd} is this process");
        }
        assert!([-10_000, -10_001, -20_000].into_iter().all(is_own_pidfd));
    }

    #[test]
    fn an_own_pidfd_is_distinguished_from_others() {
        // SAFETY: takes integers.
        let own = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) } as i32;
        // SAFETY: takes integers.
        let other = unsafe { libc::syscall(libc::SYS_pidfd_open, 1, 0) } as i32;
        assert!(
            own >= 0 && other >= 0,
            "{}",
            std::io::Error::last_os_error()
        );
        assert!(is_own_pidfd(own));
        assert!(!is_own_pidfd(other) && !is_own_pidfd(-1) && !is_own_pidfd(0));
        for fd in [own, other] {
            // SAFETY: the test owns the descriptor.
            unsafe { libc::close(fd) };
        }
    }
}
