//! A query about one mapping of a task, without the text of `/proc/PID/maps`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// A writable mapping of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Writable {
    pub(in super::super) start: u64,
    pub(in super::super) end: u64,
    pub(in super::super) private: bool,
}

/// Asks the open file `/proc/PID/maps` for the writable mapping that contains `address`, or for the
/// next one above it.
///
/// # Errors
/// `ENOTTY` on a kernel before 6.11. `ESRCH` if the process has ended.
/// # Source
/// `PROCMAP_QUERY`, include/uapi/linux/fs.h.
pub(in super::super) fn writable_at_or_after(
    maps: &File,
    address: u64,
) -> io::Result<Option<Writable>> {
    let mut query = Query {
        size: size_of::<Query>() as u64,
        flags: WRITABLE | COVERING_OR_NEXT,
        address,
        ..Query::default()
    };
    // SAFETY: the kernel reads and writes the structure, whose size stands in its first word. The
    // sizes of the buffers for names are 0, so the kernel writes nothing else.
    let answer = unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
    if answer < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENOENT) {
            Ok(None)
        } else {
            Err(error)
        };
    }
    Ok(Some(Writable {
        start: query.start,
        end: query.end,
        private: query.vma_flags & SHARED == 0,
    }))
}

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    address: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    device: [u32; 2],
    name_size: u32,
    build_id_size: u32,
    name: u64,
    build_id: u64,
}

const WRITABLE: u64 = 0x02;
const SHARED: u64 = 0x08;
const COVERING_OR_NEXT: u64 = 0x10;
const PROCMAP_QUERY: libc::Ioctl = 0xc068_6611_u32 as libc::Ioctl;

const _: () = assert!(size_of::<Query>() == 0x68);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps;

    #[test]
    fn the_queries_find_the_writable_mappings_that_the_text_lists() {
        // SAFETY: the child makes only system calls.
        let child = unsafe { libc::fork() };
        if child == 0 {
            loop {
                // SAFETY: takes no arguments.
                unsafe { libc::pause() };
            }
        }
        let file = File::open(format!("/proc/{child}/maps")).expect("a child can be examined");
        let (mut found, mut at) = (Vec::new(), 0);
        let error = loop {
            match writable_at_or_after(&file, at) {
                Ok(Some(mapping)) => {
                    at = mapping.end;
                    found.push(mapping);
                }
                Ok(None) => break None,
                Err(error) => break error.raw_os_error(),
            }
        };
        let listed = maps::read(child).expect("a child can be examined");
        // SAFETY: takes integers, and the process is this test's child.
        unsafe { libc::kill(child, libc::SIGKILL) };
        // SAFETY: the child is this test's, and nothing else waits for it.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        if error == Some(libc::ENOTTY) {
            eprintln!("SKIP: PROCMAP_QUERY needs Linux 6.11");
            return;
        }
        let listed: Vec<Writable> = listed
            .iter()
            .filter(|mapping| mapping.writable)
            .map(|mapping| Writable {
                start: mapping.start,
                end: mapping.end,
                private: mapping.private,
            })
            .collect();
        assert_eq!((error, found), (None, listed));
        let gone = writable_at_or_after(&file, 0).expect_err("the child has ended");
        assert_eq!(gone.raw_os_error(), Some(libc::ESRCH));
    }
}
