//! Changes by processes, threads and libraries.
//!
//! # Safety
//! A library is loaded from a private copy of its file, and closed once. No function of the library
//! is called.
#![expect(unsafe_code, reason = "dlopen and dlclose; see the Safety section")]

use std::ffi::CString;
use std::fs;
use std::hint::black_box;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;

use super::{CALL_AND_UFFD, LIBC, LIBC_AND_UFFD, NONE};
use crate::coverage::files::memory_file;
use crate::coverage::operation::{Operation, Prepared, Unavailable};
use crate::coverage::other::Other;
use crate::coverage::page::Judge;
use crate::coverage::region::{Region, page_size};
use crate::sys::{self, Fork};

use super::maps::PAGES;

/// Larger than libc's cache of the stacks of ended threads.
const STACK: usize = 64 << 20;

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "fork (shares the page)",
        judge: Judge::Exclusive,
        claimed: CALL_AND_UFFD,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            let parent = rustix::process::getpid();
            Ok(Prepared::new(&region, 0, move || match sys::fork()? {
                (Fork::Parent(_), _held) => Ok(()),
                // The child stays until its parent ends, so that the page is still shared when its
                // state is read.
                (Fork::Child, _held) => sys::wait_for_the_end_of(parent),
            }))
        },
    },
    Operation {
        name: "write after fork",
        judge: Judge::Exclusive,
        claimed: NONE,
        prepare: || {
            let region = Region::anonymous(PAGES)?;
            let other = Other::start(|_, _| Ok(()))?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                region.touch();
                drop(other);
                Ok(())
            }))
        },
    },
    Operation {
        name: "thread exit (unused stack)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || stack_goes(8 << 20, 256 << 10),
    },
    Operation {
        name: "thread exit (stack freed)",
        judge: Judge::Frame,
        claimed: LIBC_AND_UFFD,
        prepare: || stack_goes(STACK, 0),
    },
    Operation {
        name: "dlclose",
        judge: Judge::Frame,
        claimed: LIBC,
        prepare: library,
    },
];

/// Ends a thread that has used at least `below` bytes of its stack, and watches the page at that
/// depth.
fn stack_goes(size: usize, below: usize) -> Result<Prepared, Unavailable> {
    let (used, uses) = channel();
    let (end, ends) = channel::<()>();
    let thread = std::thread::Builder::new()
        .stack_size(size)
        .spawn(move || {
            let here = 0_u8;
            let deep = if below == 0 {
                (&raw const here).addr()
            } else {
                use_stack(below)
            };
            // Both results may be ignored. The main thread waits for the address, and lets this
            // thread end by dropping `end`, which makes `recv` fail.
            let _ = used.send(deep);
            let _ = ends.recv();
            black_box(&here);
        })?;
    let watched = uses.recv().map_err(|_| "the thread ended at once")?;
    Ok(Prepared::at(watched, move || {
        drop(end);
        thread
            .join()
            .map_err(|_| io::Error::other("the thread panicked"))
    }))
}

/// Recurses until the stack is `depth` bytes deeper, and returns an address there.
#[inline(never)]
fn use_stack(depth: usize) -> usize {
    const FRAME: usize = 4096;
    let frame = black_box([1_u8; FRAME]);
    if depth < FRAME {
        (&raw const frame).addr()
    } else {
        use_stack(depth - FRAME) + usize::from(black_box(frame)[0] - 1)
    }
}

/// Unloads a library; the watched page is part of its data.
fn library() -> Result<Prepared, Unavailable> {
    // A library that this process has loaded. The loader loads a copy of its file once more.
    let maps = fs::read_to_string("/proc/self/maps")?;
    let path = |name: &str| {
        maps.lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .find(|path| path.contains(name))
            .map(str::to_owned)
    };
    let original = path("/libgcc_s.so")
        .or_else(|| path("/libm.so"))
        .ok_or("no library to load a copy of")?;
    let bytes = fs::read(&original)?;
    let file = memory_file(bytes.len().div_ceil(page_size()))?;
    rustix::io::pwrite(&file, &bytes, 0)?;
    let name = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .expect("no zero byte in a number");
    // SAFETY: the name is a live string; the library's constructors ran in this process before, in
    // the original.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(Unavailable(format!(
            "a copy of {original} cannot be loaded"
        )));
    }
    let maps = fs::read_to_string("/proc/self/maps")?;
    let writable = |line: &&str| line.contains("/memfd:coverage") && line.contains(" rw-p ");
    let data = maps
        .lines()
        .find(writable)
        .ok_or("the library has no data")?;
    let start = data
        .split('-')
        .next()
        .and_then(|start| usize::from_str_radix(start, 16).ok());
    let start = start.ok_or("the library has no data")?;
    let handle = handle.expose_provenance();
    Ok(Prepared::at(start, move || {
        // SAFETY: the handle is from `dlopen`, and this closure, which runs once, alone closes it.
        match unsafe { libc::dlclose(std::ptr::with_exposed_provenance_mut(handle)) } {
            0 => Ok(()),
            _ => Err(io::Error::other("dlclose refused")),
        }
    }))
}
