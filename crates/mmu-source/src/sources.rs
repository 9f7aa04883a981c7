//! One table of what each source can do, shared by `docs/sources.md`, this crate's front page and
//! `mmun doctor`.

/// What a source sees, misses, costs and needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceInfo {
    /// The name that `mmun coverage --source` takes.
    pub name: &'static str,
    /// Which changes the source sees.
    pub sees: &'static str,
    /// When the source notifies subscribers.
    pub notifies: &'static str,
    /// Which changes the source misses.
    pub misses: &'static str,
    /// What a callback may do.
    pub callback: &'static str,
    /// What the source costs.
    pub cost: &'static str,
    /// What the source needs.
    pub needs: &'static str,
}

/// Makes the table twice from one text: as constants, and as documentation.
macro_rules! sources {
    ($($name:literal: $sees:literal, $notifies:literal, $misses:literal, $callback:literal, $cost:literal, $needs:literal;)*) => {
        /// The sources.
        ///
        /// | source | sees | notifies | misses | a callback may | costs | needs |
        /// | --- | --- | --- | --- | --- | --- | --- |
        $(#[doc = concat!("| `", $name, "` | ", $sees, " | ", $notifies, " | ", $misses, " | ", $callback, " | ", $cost, " | ", $needs, " |")])*
        pub const SOURCES: &[SourceInfo] = &[$(SourceInfo {
            name: $name, sees: $sees, notifies: $notifies, misses: $misses, callback: $callback, cost: $cost, needs: $needs,
        }),*];
    };
}

sources! {
    "kernel":
        "every change of an armed range, including changes by other processes, reclaim, copy on write, truncation and io_uring",
        "a counter is incremented before the change; callbacks run at the next look-up, or soon after the change",
        "nothing; it also reports some changes of other memory",
        "allocate, lock, map, unmap, arm and disarm; it must not wait for a thread that may be in `drain`",
        "two loads for each use; a fill that follows a change waits some microseconds (x86-64 or aarch64 with BTF; elsewhere it creates a virtual machine)",
        "/dev/kvm, CAP_BPF and CAP_PERFMON, Linux 5.12 (aarch64: 5.18); or a broker (mmun broker), Linux 5.15 (5.18)";
    "hook":
        "changes through libc: munmap, mmap over live memory, mremap, madvise, brk, sbrk, shmat, shmdt, mprotect, syscall(2)",
        "before and after the change, in the calling thread",
        "truncated or punched files (ftruncate, fallocate), copy on write (fork), mlock, calls that bypass libc, a second libc, other processes",
        "subscribe, put, map and unmap; it must not allocate, because it may run inside free()",
        "some 50 ns for each call",
        "x86-64 or aarch64, glibc";
    "uffd":
        "munmap, mremap, madvise, punched holes and fork, on armed ranges",
        "at about the time of the change; the change does not wait for callbacks",
        "mprotect, copy on write, reclaim, truncation; memory that is newly mapped at an armed address",
        "anything except waiting for the source",
        "the thread that changes the memory waits until the source has read the event",
        "CAP_SYS_PTRACE, Linux 6.7";
    "process":
        "memory calls, fork, exec and exit of other processes",
        "before and after the change, while the task is stopped",
        "changes without a memory call of a traced task (truncated or punched files, page faults); if a call splits a huge page, the rest of it",
        "allocate, lock and block; it must not wait for a stopped task",
        "two stops of the task for each memory call",
        "ptrace of a program that has no tracer and does not trace itself (AddressSanitizer: LSAN_OPTIONS=detect_leaks=0), Linux 5.3, x86-64 or aarch64";
}

impl SourceInfo {
    /// Returns the source's row of the table, in Markdown.
    #[must_use]
    pub fn row(&self) -> String {
        let Self {
            name,
            sees,
            notifies,
            misses,
            callback,
            cost,
            needs,
        } = self;
        format!("| `{name}` | {sees} | {notifies} | {misses} | {callback} | {cost} | {needs} |")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_the_same_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/sources.md");
        let document = std::fs::read_to_string(path).expect("docs/sources.md is there");
        for source in SOURCES {
            assert!(
                document.contains(&source.row()),
                "docs/sources.md lacks:\n{}",
                source.row()
            );
        }
    }
}
