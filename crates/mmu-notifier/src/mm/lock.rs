//! The lock that serialises the registrars of one address space.

use super::{Mm, MmWithUser};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};
use crate::{WouldDeadlock, lockdep};
use std::fmt;
use std::ops::Deref;

/// The part of `mmap_lock` that this crate needs: registrars hold the lock, and it records its
/// holder. So a thread that already holds the lock gets an error instead of a deadlock with itself.
pub(super) struct MmapLock {
    lock: Mutex<()>,
    /// The id of the thread that holds `lock` (see [`this_thread`]), or zero if no thread does.
    holder: AtomicUsize,
}

impl MmapLock {
    pub(super) fn new() -> Self {
        Self {
            lock: Mutex::new(()),
            holder: AtomicUsize::new(0),
        }
    }
}

srcu::thread_word! {
    /// This thread's id, or zero if it has none yet.
    static MARK: u64 = 0;
}

/// Returns an id of this thread, which is not zero and which no other thread ever gets.
fn this_thread() -> usize {
    static LAST: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    if MARK.get() == 0 {
        MARK.set(LAST.fetch_add(1, Ordering::Relaxed) as u64 + 1);
    }
    MARK.get() as usize
}

/// The write lock of an address space's mappings, held by this thread until dropped.
///
/// [`Subsystem::get_locked`](crate::Subsystem::get_locked) takes it as proof. While it is held, no
/// other thread can register on the address space. Lookups of existing subscriptions, puts and
/// brackets are not affected.
///
/// # Source
/// `mmap_write_lock`, include/linux/mmap_lock.h, Linux 5.15. Differs: brackets do not take it, so
/// that they nest freely.
///
/// # Examples
/// ```
/// use mmu_notifier::{GetError, MmWithUser, Notifier, Subsystem};
///
/// struct Shadow;
/// impl Notifier for Shadow {}
/// static SHADOW: Subsystem<Shadow> = Subsystem::new(|_| Ok(Shadow));
///
/// let mm = MmWithUser::new();
/// let mut locked = mm.mmap_write_lock()?;
/// assert_eq!(SHADOW.get(&mm).err(), Some(GetError::WouldDeadlock), "it would wait for the lock");
/// let held = SHADOW.get_locked(&mut locked)?;
/// drop(locked);
/// held.put();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "the address space is locked only as long as the guard lives"]
#[doc(alias = "mmap_write_lock")]
pub struct MmapWriteGuard<'a> {
    mm: &'a MmWithUser,
    _lock: MutexGuard<'a, ()>,
}

impl MmWithUser {
    /// Takes the write lock of this address space's mappings.
    ///
    /// # Blocking
    /// Sleeps while another thread holds the lock. That thread may be a registrar that waits for
    /// open brackets.
    /// # Errors
    /// [`WouldDeadlock`] if this thread holds the lock already, or is inside a bracket of this
    /// address space or a deferred free. There, a registrar that holds the lock could wait for this
    /// thread, while this thread waits for the lock. Always if the address space is that of a
    /// parent process.
    #[cfg_attr(debug_assertions, track_caller)]
    pub fn mmap_write_lock(&self) -> Result<MmapWriteGuard<'_>, WouldDeadlock> {
        let mmap_lock = &self.0.0.mmap_lock;
        // ORDER: Relaxed is enough. Only this thread ever stores its own id, so it reads its id if
        // and only if it holds the lock.
        if self.would_deadlock() || mmap_lock.holder.load(Ordering::Relaxed) == this_thread() {
            return Err(WouldDeadlock);
        }
        lockdep::might_wait(Some(self.id()));
        let guard = lock(&mmap_lock.lock);
        mmap_lock.holder.store(this_thread(), Ordering::Relaxed);
        Ok(MmapWriteGuard {
            mm: self,
            _lock: guard,
        })
    }
}

impl Drop for MmapWriteGuard<'_> {
    fn drop(&mut self) {
        // The drop of the field `_lock` releases the lock itself, after this.
        self.mm.0.0.mmap_lock.holder.store(0, Ordering::Relaxed);
    }
}

impl MmapWriteGuard<'_> {
    /// Returns the address space that is locked.
    #[must_use]
    pub fn mm(&self) -> &MmWithUser {
        self.mm
    }
}

impl Deref for MmapWriteGuard<'_> {
    type Target = Mm;

    fn deref(&self) -> &Mm {
        self.mm
    }
}

impl fmt::Debug for MmapWriteGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MmapWriteGuard").field(self.mm).finish()
    }
}
