//! What a handler has to look up, without the allocator: it may be running inside `free`.

#![allow(unsafe_code, reason = "tests make descriptors")]

use super::raw::{self, File};
use crate::process::maps::{self, Mapping};

/// Calls `f` for every mapping of this process, in order of address, until it says `false`.
pub(super) fn mappings(mut f: impl FnMut(&Mapping) -> bool) {
    let Ok(file) = File::open(b"/proc/self/maps\0") else { return };
    // A line is its columns, at most about 80 bytes, and a path, of which only the beginning matters.
    lines(file, |line| maps::parse(line).is_none_or(|mapping| f(&mapping)));
}

/// The start of the mapping that holds `address`.
pub(super) fn mapping_start(address: u64) -> Option<u64> {
    let mut found = None;
    mappings(|mapping| {
        if mapping.start <= address && address < mapping.end {
            found = Some(mapping.start);
        }
        mapping.end <= address
    });
    found
}

/// The end of the last mapping of the user's half.
pub(super) fn top() -> Option<u64> {
    const KERNEL_HALF: u64 = 1 << 63;
    let mut top = None;
    mappings(|mapping| {
        if mapping.end < KERNEL_HALF {
            top = Some(mapping.end);
        }
        true
    });
    top
}

/// Tells whether a pidfd names this process, or cannot be looked at.
pub(super) fn is_own_pidfd(fd: i32) -> bool {
    // PIDFD_SELF_THREAD and PIDFD_SELF_THREAD_GROUP, Linux 6.14.
    if fd == -10000 || fd == -20000 {
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
    let Ok(file) = File::open(&path[..=FOLDER.len() + digits]) else { return true };
    // A descriptor without the line is no pidfd.
    let mut is_own = false;
    lines(file, |line| {
        if let Some(number) = line.strip_prefix(b"Pid:") {
            let number = std::str::from_utf8(number.trim_ascii()).ok().and_then(|text| text.parse::<u64>().ok());
            is_own = number == Some(raw::getpid());
        }
        true
    });
    is_own
}

/// Calls `f` for every line, cut off after a kilobyte, until it says `false`.
fn lines(mut file: File, mut f: impl FnMut(&[u8]) -> bool) {
    let mut line = [0_u8; 1024];
    let mut length = 0;
    let mut buffer = [0_u8; 2048];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => read,
            Err(libc::EINTR) => continue,
            Err(_) => return,
        };
        for byte in &buffer[..read] {
            if *byte == b'\n' {
                if !f(&line[..length]) {
                    return;
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
        let own = mapping_start(mapping_start as *const () as u64).expect("this function is mapped");
        let all = maps::read(std::process::id() as i32).expect("/proc is there");
        assert!(all.iter().any(|mapping| mapping.start == own));
        assert_eq!(top(), all.iter().rfind(|mapping| mapping.end < 1 << 63).map(|mapping| mapping.end));
        assert_eq!(mapping_start(0), None);
    }

    #[test]
    fn an_own_pidfd_is_told_from_others() {
        // SAFETY: makes a descriptor.
        let own = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) } as i32;
        // SAFETY: makes a descriptor.
        let other = unsafe { libc::syscall(libc::SYS_pidfd_open, 1, 0) } as i32;
        assert!(own >= 0 && other >= 0, "{}", std::io::Error::last_os_error());
        assert!(is_own_pidfd(own) && is_own_pidfd(-10000));
        assert!(!is_own_pidfd(other) && !is_own_pidfd(-1) && !is_own_pidfd(0));
        for fd in [own, other] {
            // SAFETY: it is this test's own.
            unsafe { libc::close(fd) };
        }
    }
}
