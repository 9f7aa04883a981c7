//! The host's allocator is as it was when the hook is installed.

use crate::child::alone;
use crate::pages::{block, free};
use mmu_source::hook::Hook;

/// Larger than the threshold of glibc, 128 KiB, from which on it maps each block by itself. It
/// raises the threshold to the size of a mapped block that is freed.
const SIZE: usize = 200 << 10;

fn mapped_blocks() -> usize {
    // SAFETY: no preconditions.
    unsafe { libc::mallinfo2() }.hblks
}

#[test]
fn a_large_block_is_still_mapped_by_itself() {
    alone("allocator::a_large_block_is_still_mapped_by_itself", || {
        let hook = Hook::install().expect("the hook works on this machine");
        let before = mapped_blocks();
        let large = block(SIZE);
        assert_eq!(mapped_blocks(), before + 1, "the threshold is what it was");
        // From here on it is raised, and this test would not pass again.
        free(large);
        free(block(SIZE));
        assert_eq!(mapped_blocks(), before);
        drop(hook);
    });
}
