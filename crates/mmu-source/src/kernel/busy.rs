//! Records what this thread is doing for the source, so that neither a callback nor a signal
//! handler waits for its own thread.

srcu::thread_word! {
    /// One bit for each [`Flag`] that is set.
    static DOING: u64 = 0;
}

/// A flag of this thread, which is set until this value is dropped.
///
/// A thread sets the flag before it tries to take the corresponding lock, and clears the flag after
/// it has released the lock. So if a signal handler finds the flag clear, its own thread does not
/// hold the lock.
///
/// `set` loads the word and then stores it. A signal handler may run between the load and the
/// store, because the handler has cleared every flag of its own when it returns.
#[derive(Debug)]
pub(super) struct Flag(u64);

impl Flag {
    /// The thread passes records to subscribers and runs callbacks.
    pub(super) const TELLING: u64 = 1;
    /// The thread takes records out of the ring.
    pub(super) const TAKING: u64 = 2;
    /// The thread waits for changes under way, or for the lock of the threads that wait.
    pub(super) const WAITING: u64 = 4;

    /// Sets the flag. Returns `None` if it is already set.
    pub(super) fn set(flag: u64) -> Option<Self> {
        let doing = DOING.get();
        DOING.mark(doing | flag);
        // `then_some` would be wrong: it would make a `Flag` and drop it, which clears the outer
        // flag.
        (doing & flag == 0).then(|| Self(flag))
    }
}

impl Drop for Flag {
    fn drop(&mut self) {
        DOING.mark(DOING.get() & !self.0);
    }
}

/// Tells whether the caller is a callback that the source runs, or a signal handler that has
/// interrupted this thread while it took in records or passed them on.
pub(super) fn is_inside() -> bool {
    DOING.get() & (Flag::TELLING | Flag::TAKING) != 0
}

/// Tells whether the caller is a callback that the source runs.
pub(super) fn is_telling() -> bool {
    DOING.get() & Flag::TELLING != 0
}
