//! What this thread is doing for the source, so that neither a callback nor a signal handler waits
//! for its own thread.

srcu::thread_word! {
    /// A bit for each [`Flag`] that is set.
    static DOING: u64 = 0;
}

/// A flag of this thread, for as long as it lives. It is set before the lock that it stands for is
/// tried, and cleared when that is free again: a signal handler that finds it clear finds no lock
/// held by its own thread.
///
/// A handler leaves all flags as it has found them, so it may come between the look at the word and
/// the write to it.
#[derive(Debug)]
pub(super) struct Flag(u64);

impl Flag {
    /// The thread is handing records on, and runs callbacks.
    pub(super) const TELLING: u64 = 1;
    /// The thread is taking records in.
    pub(super) const TAKING: u64 = 2;
    /// The thread waits for changes under way, or for the lock of the threads that do.
    pub(super) const WAITING: u64 = 4;

    /// `None` if the flag is set already.
    pub(super) fn set(flag: u64) -> Option<Self> {
        let doing = DOING.get();
        DOING.mark(doing | flag);
        // Not `then_some`: a value that is made and dropped would clear the outer flag.
        (doing & flag == 0).then(|| Self(flag))
    }
}

impl Drop for Flag {
    fn drop(&mut self) {
        DOING.mark(DOING.get() & !self.0);
    }
}

/// Whether the caller is a callback that the source runs, or a signal handler that has interrupted
/// it.
pub(super) fn is_inside() -> bool {
    DOING.get() & (Flag::TELLING | Flag::TAKING) != 0
}

/// Whether the caller is a callback that the source runs.
pub(super) fn is_telling() -> bool {
    DOING.get() & Flag::TELLING != 0
}
