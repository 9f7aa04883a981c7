//! Installing the hook does not change how the program's allocator behaves.

use crate::child::alone;
use crate::pages::{block, free};
use mmu_source::hook::Hook;

/// Larger than glibc's threshold of 128 KiB: glibc maps a block of this size separately. When such
/// a block is freed, glibc raises the threshold to the size of that block.
const SIZE: usize = 200 << 10;

fn mapped_blocks() -> usize {
    // SAFETY: takes no arguments and returns a struct.
    unsafe { libc::mallinfo2() }.hblks
}

#[test]
fn a_large_block_is_still_mapped_by_itself() {
    alone("allocator::a_large_block_is_still_mapped_by_itself", || {
        let hook = Hook::install().expect("the hook works on this machine");
        let before = mapped_blocks();
        let large = block(SIZE);
        assert_eq!(mapped_blocks(), before + 1, "the threshold is what it was");
        // This free raises the threshold, so the check above would fail from here on.
        free(large);
        free(block(SIZE));
        assert_eq!(mapped_blocks(), before);
        drop(hook);
    });
}
