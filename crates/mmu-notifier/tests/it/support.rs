//! A subscriber that logs its calls, and tools to stop it in the middle of a call.

use mmu_notifier::{
    InvalidateRange, Mm, MmWithUser, Notifier, Subscription, Subsystem, Va, VaRange, WouldBlock,
};
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// The points in a subscriber's life that it logs. At each except `Released`, a test can run code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    Alloc,
    Start,
    TryStart,
    End,
    Release,
    Released,
    Young,
    Free,
}

/// The events in order: the name of the subscriber, and the point.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<(&'static str, At)>>>);

impl Log {
    pub(crate) fn add(&self, name: &'static str, at: At) {
        self.0.lock().unwrap().push((name, at));
    }

    pub(crate) fn all(&self) -> Vec<(&'static str, At)> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn clear(&self) {
        self.0.lock().unwrap().clear();
    }

    pub(crate) fn count(&self, name: &str, at: At) -> usize {
        self.all()
            .iter()
            .filter(|entry| **entry == (name, at))
            .count()
    }

    /// Returns the names of the subscribers that reached `at`, in order.
    pub(crate) fn names(&self, at: At) -> Vec<&'static str> {
        self.all()
            .into_iter()
            .filter(|entry| entry.1 == at)
            .map(|entry| entry.0)
            .collect()
    }
}

/// The code that a test runs at each point except `Released`. If it returns false at `TryStart`,
/// the start refuses.
pub(crate) type Hook = Arc<dyn Fn(At) -> bool + Send + Sync>;

/// Returns a hook that does nothing.
pub(crate) fn nothing() -> Hook {
    Arc::new(|_| true)
}

/// Returns a hook that waits at `gate` whenever it reaches `at`.
pub(crate) fn stop(at: At, gate: &Arc<Gate>) -> Hook {
    let gate = Arc::clone(gate);
    Arc::new(move |now| {
        if now == at {
            gate.pass();
        }
        true
    })
}

/// A subscriber that logs its starts, ends, releases and calls of `test_young`, and its drop.
pub(crate) struct Probe {
    pub(crate) name: &'static str,
    pub(crate) log: Log,
    hook: Hook,
}

impl Probe {
    pub(crate) fn new(name: &'static str, log: &Log, hook: Hook) -> Self {
        Self {
            name,
            log: log.clone(),
            hook,
        }
    }

    fn at(&self, at: At) -> bool {
        self.log.add(self.name, at);
        (self.hook)(at)
    }
}

impl Notifier for Probe {
    fn release(&self, _mm: &Mm) {
        self.at(At::Release);
        self.log.add(self.name, At::Released);
    }

    fn invalidate_range_start(&self, _range: &InvalidateRange<'_>) {
        self.at(At::Start);
    }

    fn try_invalidate_range_start(&self, _range: &InvalidateRange<'_>) -> Result<(), WouldBlock> {
        if self.at(At::TryStart) {
            Ok(())
        } else {
            Err(WouldBlock)
        }
    }

    fn invalidate_range_end(&self, _range: &InvalidateRange<'_>) {
        self.at(At::End);
    }

    fn test_young(&self, _mm: &Mm, _address: Va) -> bool {
        self.at(At::Young);
        false
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.at(At::Free);
    }
}

/// A subsystem of probes, made by a closure that logs each `alloc`.
pub(crate) type Probes = Subsystem<
    Probe,
    Infallible,
    Box<dyn Fn(&MmWithUser) -> Result<Probe, Infallible> + Send + Sync>,
>;

pub(crate) fn probes(name: &'static str, log: &Log, hook: Hook) -> Probes {
    let log = log.clone();
    Subsystem::new(Box::new(move |_mm| {
        log.add(name, At::Alloc);
        hook(At::Alloc);
        Ok(Probe::new(name, &log, Arc::clone(&hook)))
    }))
}

/// A gate. Each thread that reaches the gate waits until a test opens it.
#[derive(Default)]
pub(crate) struct Gate {
    /// How many threads have reached the gate, and whether it is open.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        let _open = self.changed.wait_while(state, |state| !state.1).unwrap();
    }

    /// Waits until `n` threads have reached the gate.
    pub(crate) fn wait_for(&self, n: usize) {
        let _state = self
            .changed
            .wait_while(self.state.lock().unwrap(), |state| state.0 < n)
            .unwrap();
    }

    pub(crate) fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

/// Work on another thread. A test can check that the thread is blocked, and wait for the result.
pub(crate) struct Task<T> {
    tid: libc::pid_t,
    result: Receiver<T>,
    thread: thread::JoinHandle<()>,
}

pub(crate) fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Task<T> {
    let (tell, tid) = channel();
    let (sender, result) = channel();
    let thread = thread::spawn(move || {
        // SAFETY: The call has no preconditions.
        tell.send(unsafe { libc::gettid() }).unwrap();
        drop(sender.send(work()));
    });
    Task {
        tid: tid.recv().unwrap(),
        result,
        thread,
    }
}

impl<T> Task<T> {
    /// Asserts that the thread is blocked: it sleeps, and it has no result after 20 ms.
    pub(crate) fn assert_blocked(&self) {
        wait_until(|| self.thread.is_finished() || self.sleeps());
        assert!(matches!(
            self.result.recv_timeout(Duration::from_millis(20)),
            Err(RecvTimeoutError::Timeout)
        ));
    }

    /// Tells whether the thread sleeps. The answer is false also if the thread has ended.
    fn sleeps(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", self.tid))
            .unwrap_or_default();
        // The state follows the name, which is in parentheses.
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('S'))
    }

    /// Interrupts the thread with a signal that does nothing.
    pub(crate) fn interrupt(&self) {
        use std::os::unix::thread::JoinHandleExt;
        extern "C" fn ignore(_signal: libc::c_int) {}
        // SAFETY: `sigaction` needs a valid struct. A struct of zeroes is valid. It has no flags,
        // so no SA_RESTART.
        let mut action = unsafe { std::mem::zeroed::<libc::sigaction>() };
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        assert_eq!(
            // SAFETY: The handler does nothing, which is safe in a signal handler. The call does
            // not return the old action.
            unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) },
            0
        );
        assert_eq!(
            // SAFETY: `pthread_kill` needs a thread that was not joined. `join` consumes the task,
            // so this one was not.
            unsafe { libc::pthread_kill(self.thread.as_pthread_t(), libc::SIGUSR1) },
            0
        );
    }

    /// Waits for the result. After 300 s it panics, because the thread is probably deadlocked.
    pub(crate) fn join(self) -> T {
        let result = self
            .result
            .recv_timeout(Duration::from_secs(300))
            .expect("the other thread hangs or panicked");
        self.thread.join().unwrap();
        result
    }
}

/// Yields until `condition` holds.
pub(crate) fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

pub(crate) fn page(number: u64) -> VaRange {
    VaRange::covering(Va::new(number << 12), 1).unwrap()
}

/// A place in which a test leaves a subscription for a callback to put.
pub(crate) type Slot<N> = Arc<Mutex<Option<Subscription<N>>>>;

/// Returns a hook that takes the subscription out of the slot when it reaches `when`, and drops it.
pub(crate) fn put_at(when: At, slot: &Slot<Probe>) -> Hook {
    let slot = Arc::clone(slot);
    Arc::new(move |at| {
        if at == when {
            let subscription = slot.lock().unwrap().take();
            drop(subscription);
        }
        true
    })
}

/// Counts calls.
#[derive(Clone, Default)]
pub(crate) struct Counter(Arc<AtomicUsize>);

impl Counter {
    pub(crate) fn add(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Counts a call if `it` is true.
    pub(crate) fn add_if(&self, it: bool) {
        if it {
            self.add();
        }
    }

    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}
