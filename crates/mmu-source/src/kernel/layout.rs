//! What programs, their maps and this process agree on: sizes, and where words lie.

/// The size of the ring in bytes: 8,192 records of 32 bytes.
pub(super) const RING: usize = 256 << 10;

/// Where the words of the shared header lie. What is read with each event is apart from what is
/// written often, by two cache lines: processors fetch lines in pairs.
pub(super) mod header {
    pub(in super::super) const BYTES: usize = 4096;
    /// How many events hit an armed range, and one.
    pub(in super::super) const GENERATION: usize = 0;
    /// Whether a range was ever armed.
    pub(in super::super) const ON: usize = 128;
    /// Whether there was an event since the last wait: see `wait.rs`.
    pub(in super::super) const DIRTY: usize = 136;
    /// The page whose events are questions.
    pub(in super::super) const SCRATCH: usize = 144;
    /// Whether a thread is going to look at the ring anyway.
    pub(in super::super) const AWAKE: usize = 152;
    /// How many ranges are armed.
    pub(in super::super) const ARMED: usize = 160;
    /// How many of them are wider than the filter.
    pub(in super::super) const WIDE: usize = 168;
    /// Nothing: zero.
    pub(in super::super) const ZERO: usize = 176;
    /// How many of them belong to each level: a word for each.
    pub(in super::super) const RANGES: usize = 192;
    /// How many hits found B's count at zero. For guesses: processors overwrite each other's
    /// additions.
    pub(in super::super) const IGNORED: usize = 384;
    /// How many hits found the ring full.
    pub(in super::super) const LOST: usize = 512;
    /// The question, and the last one whose answer was that nothing is under way.
    pub(in super::super) const ASKED: usize = 640;
    pub(in super::super) const ANSWERED: usize = 648;
}

/// Where the words lie that only programs see.
pub(super) mod private {
    pub(in super::super) const BYTES: usize = 64;
    /// The address of machine B's count of changes under way; 0 if there is none.
    pub(in super::super) const COUNT: usize = 0;
    /// The `f_op` of a virtual machine's file.
    pub(in super::super) const FILE_OPS: usize = 8;
    /// The address space whose changes are told: the address of its `struct mm_struct`.
    pub(in super::super) const SPACE: usize = 16;
}
