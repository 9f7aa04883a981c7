//! Calls that libc makes for itself: in the allocator, for threads, in the dynamic loader.

use crate::child::alone;
use crate::log::Watch;
use crate::pages::{at, block, free, page_size, trim};
use mmu_notifier::Event;
use std::ffi::CStr;
use std::ptr;

/// A block above the threshold: the allocator maps it separately.
const LARGE: usize = 64 << 20;

#[test]
fn free_of_a_large_block() {
    let watch = Watch::new();
    let block = block(LARGE);
    // SAFETY: fills the test's own block.
    unsafe { ptr::write_bytes(at(block).cast::<u8>(), 0x5a, LARGE) };
    watch.listen_and_look(block, LARGE);
    free(block);
    let heard = watch.heard();
    assert_eq!(heard.len(), 2, "{heard:?}");
    assert!(
        heard[0].is_start && heard[0].event == Event::Unmap && heard[0].content == 0x5a,
        "{heard:?}"
    );
    assert!(
        heard[0].from <= 0 && heard[0].to >= LARGE as i64,
        "all of it: {heard:?}"
    );
}

#[test]
fn realloc_that_moves_the_pages() {
    let watch = Watch::new();
    let block = block(LARGE);
    watch.listen(block, LARGE);
    // SAFETY: enlarges the test's own block, which may move.
    let larger = unsafe { libc::realloc(at(block), 2 * LARGE) };
    let heard = watch.heard();
    assert!(
        heard
            .iter()
            .any(|heard| heard.is_start && heard.event == Event::Unmap),
        "{heard:?}"
    );
    free(larger.expose_provenance());
}

#[test]
fn malloc_trim_of_the_top_and_of_a_hole() {
    alone("inside::malloc_trim_of_the_top_and_of_a_hole", || {
        let watch = Watch::new();
        // The blocks are below the threshold for separate mappings, and too large for the
        // allocator's caches.
        for (option, value) in [
            (libc::M_MMAP_THRESHOLD, 1 << 30),
            (libc::M_TRIM_THRESHOLD, 1 << 30),
        ] {
            // SAFETY: sets an option.
            assert_eq!(unsafe { libc::mallopt(option, value) }, 1);
        }
        let [hole, fence] = [block(1 << 20), block(1 << 16)];
        free(hole);
        watch.listen(hole, 1 << 20);
        trim();
        let heard = watch.heard();
        assert!(
            heard
                .iter()
                .any(|heard| heard.is_start && heard.event == Event::Clear),
            "hole: {heard:?}"
        );
        let top = block(4 << 20);
        free(top);
        watch.listen(top, 4 << 20);
        trim();
        let heard = watch.heard();
        assert!(
            heard
                .iter()
                .any(|heard| heard.is_start && heard.event == Event::Unmap),
            "top: {heard:?}"
        );
        free(fence);
    });
}

#[test]
fn the_stack_of_a_thread_that_has_ended() {
    // Larger than glibc's cache of stacks.
    const STACK: usize = 64 << 20;
    let spawn = || {
        std::thread::Builder::new()
            .stack_size(STACK)
            .spawn(|| ptr::from_ref(&0_u8.to_be()).addr())
    };
    alone("inside::the_stack_of_a_thread_that_has_ended", || {
        let watch = Watch::new();
        // After the first thread's stack is unmapped, the next thread's stack is mapped at the same
        // address, because no other thread maps memory here.
        let first = spawn()
            .expect("a thread")
            .join()
            .expect("it does not panic")
            & !(page_size() - 1);
        watch.listen_to_all(first, page_size());
        let second = spawn()
            .expect("a thread")
            .join()
            .expect("it does not panic")
            & !(page_size() - 1);
        let heard = watch.heard();
        assert_eq!(first, second);
        assert!(
            heard
                .iter()
                .any(|heard| heard.is_start && heard.event == Event::Unmap),
            "{heard:?}"
        );
    });
}

#[test]
fn dlclose() {
    let watch = Watch::new();
    // A library of glibc that no other code of this process uses. Its initialiser does nothing.
    const NAME: &CStr = c"libanl.so.1";
    // SAFETY: the initialiser does nothing.
    let library = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW) };
    assert!(!library.is_null(), "{NAME:?} belongs to glibc");
    // SAFETY: in glibc a handle is a `struct link_map *`, whose first field is the library's load
    // address.
    let base = unsafe { *library.cast::<usize>() };
    watch.listen_and_look(base, 1);
    // SAFETY: no code uses the library any more.
    assert_eq!(unsafe { libc::dlclose(library) }, 0);
    let heard = watch.heard();
    assert!(
        heard.len() >= 2 && heard[0].is_start && heard[0].event == Event::Unmap,
        "{heard:?}"
    );
    assert_eq!(
        heard[0].content, 0x7f,
        "its first byte is still there: an ELF file"
    );
}
