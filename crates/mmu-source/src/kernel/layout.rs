//! The sizes and offsets that the programs, their maps and this process share.

/// The size of the ring in bytes: 8,192 records of 32 bytes.
pub(super) const RING: usize = 256 << 10;

/// The offsets of the words in the shared header. The words that every event reads are two cache
/// lines away from those that are written often, because processors fetch cache lines in pairs.
pub(super) mod header {
    pub(in super::super) const BYTES: usize = 4096;
    /// Starts at one, and is incremented by each hit and by each loss that user space finds.
    pub(in super::super) const GENERATION: usize = 0;
    /// Whether a range has ever been armed.
    pub(in super::super) const ON: usize = 128;
    /// Whether an event has happened since the last wait, and which thread made it: see `wait.rs`.
    pub(in super::super) const DIRTY: usize = 136;
    /// The address of the page whose events are questions to the program: see `wait.rs`.
    pub(in super::super) const SCRATCH: usize = 144;
    /// Whether the listener is going to read the ring without a wake-up: see `awake` below.
    pub(in super::super) const AWAKE: usize = 152;
    /// The number of armed ranges.
    pub(in super::super) const ARMED: usize = 160;
    /// The number of armed ranges that are too wide for the filter.
    pub(in super::super) const WIDE: usize = 168;
    /// A word that is always zero.
    pub(in super::super) const ZERO: usize = 176;
    /// The number of armed ranges of each level, one word a level.
    pub(in super::super) const RANGES: usize = 192;
    /// The number of hits that found B's count at zero. An estimate: processors may overwrite each
    /// other's additions.
    pub(in super::super) const IGNORED: usize = 384;
    /// The number of hits that found the ring full, plus the losses that user space finds.
    pub(in super::super) const LOST: usize = 512;
    /// The number of the last question to the program. `ANSWERED` is the number of the last
    /// question that the program has answered with "nothing is under way".
    pub(in super::super) const ASKED: usize = 640;
    pub(in super::super) const ANSWERED: usize = 648;
    /// The mark that the program sets in `DIRTY` for events of the thread that has asked, or 0 if
    /// that thread has none.
    pub(in super::super) const ASKER: usize = 656;
}

/// The values of [`header::DIRTY`], besides the marks of threads, which are larger: see `wait.rs`.
pub(super) mod dirty {
    pub(in super::super) const QUIET: i32 = 0;
    pub(in super::super) const MANY: i32 = 1;
    pub(in super::super) const WAITING: i32 = 2;
}

/// The values of [`header::AWAKE`].
pub(super) mod awake {
    /// The next record must wake the listener.
    pub(in super::super) const NO: u64 = 0;
    pub(in super::super) const YES: u64 = 1;
    /// A record has woken the listener, which has not run yet.
    pub(in super::super) const CALLED: i32 = 2;
}

/// The offsets of the words that only programs see.
pub(super) mod private {
    pub(in super::super) const BYTES: usize = 64;
    /// The address of machine B's count of changes under way, or 0 if there is no B.
    pub(in super::super) const COUNT: usize = 0;
    /// The `f_op` of a virtual machine's file.
    pub(in super::super) const FILE_OPS: usize = 8;
    /// The source's address space: the address of its `struct mm_struct`.
    pub(in super::super) const SPACE: usize = 16;
    /// The source's process (`tgid`), or 0 while it is not known. For a client of a broker, the
    /// process that asked the first question; otherwise the process that loaded the programs.
    pub(in super::super) const PROCESS: usize = 24;
}
