//! A subscriber that logs the callbacks for one range. Its callbacks allocate nothing.

use mmu_notifier::{Event, InvalidateRange, Notifier, Registration, VaRange};
use mmu_source::hook::Hook;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

const ROOM: usize = 64;

/// One callback. The log keeps the callbacks in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) is_start: bool,
    pub(crate) event: Event,
    /// Relative to the start of the watched range.
    pub(crate) from: i64,
    pub(crate) to: i64,
    /// The byte at the start of the watched range, if the test asked the log to read it.
    pub(crate) content: u8,
}

#[derive(Debug, Default)]
struct Cell {
    start: AtomicU64,
    end: AtomicU64,
    what: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Log {
    from: AtomicU64,
    to: AtomicU64,
    looks: AtomicBool,
    /// The thread whose calls are logged, or 0 for all. An end callback of another thread may run
    /// after the addresses were given to this test.
    thread: AtomicU64,
    used: AtomicUsize,
    cells: [Cell; ROOM],
}

impl Log {
    const fn new() -> Self {
        Self {
            from: AtomicU64::new(0),
            to: AtomicU64::new(0),
            looks: AtomicBool::new(false),
            thread: AtomicU64::new(0),
            used: AtomicUsize::new(0),
            cells: [const {
                Cell {
                    start: AtomicU64::new(0),
                    end: AtomicU64::new(0),
                    what: AtomicU64::new(0),
                }
            }; ROOM],
        }
    }

    fn push(&self, range: &InvalidateRange<'_>, is_start: bool) {
        let from = self.from.load(Ordering::Relaxed);
        let (start, end) = ends(range.range());
        if end <= from || start >= self.to.load(Ordering::Relaxed) {
            return;
        }
        let thread = self.thread.load(Ordering::Relaxed);
        if thread != 0 && thread != this_thread() {
            return;
        }
        let Some(cell) = self.cells.get(self.used.fetch_add(1, Ordering::Relaxed)) else {
            return;
        };
        let content = if is_start && self.looks.load(Ordering::Relaxed) {
            // SAFETY: the test that asked for the content promises that the memory is mapped until
            // the call was made.
            unsafe {
                std::ptr::read_volatile(std::ptr::with_exposed_provenance::<u8>(from as usize))
            }
        } else {
            0
        };
        cell.start.store(start, Ordering::Relaxed);
        cell.end.store(end, Ordering::Relaxed);
        let event = EVENTS
            .iter()
            .position(|event| *event == range.event())
            .expect("the hook tells no other event");
        let what = event as u64 | u64::from(is_start) << 8 | u64::from(content) << 16;
        cell.what.store(what, Ordering::Release);
    }
}

const EVENTS: [Event; 4] = [
    Event::Unmap,
    Event::Clear,
    Event::ProtectionVma,
    Event::Migrate { owner: None },
];

fn this_thread() -> u64 {
    // SAFETY: takes no arguments, and returns the id of this thread.
    unsafe { libc::pthread_self() }
}

fn ends(range: VaRange) -> (u64, u64) {
    (
        range.start().get(),
        range.end().map_or(u64::MAX, |end| end.get()),
    )
}

impl Notifier for Log {
    fn invalidate_range_start(&self, range: &InvalidateRange<'_>) {
        self.push(range, true);
    }

    fn invalidate_range_end(&self, range: &InvalidateRange<'_>) {
        self.push(range, false);
    }
}

/// An installed hook together with a log.
pub(crate) struct Watch {
    pub(crate) log: Registration<Log>,
    pub(crate) hook: Hook,
}

impl Watch {
    pub(crate) fn new() -> Self {
        let log = Registration::new(&mmu_source::current(), Log::new()).expect("registers");
        Self {
            log,
            hook: Hook::install().expect("the hook works on this machine"),
        }
    }

    /// Clears the log, and logs this thread's calls on `length` bytes from `from`.
    pub(crate) fn listen(&self, from: usize, length: usize) {
        self.listen_to_all(from, length);
        self.log.thread.store(this_thread(), Ordering::Relaxed);
    }

    /// Like `listen`, for all threads.
    pub(crate) fn listen_to_all(&self, from: usize, length: usize) {
        self.log.thread.store(0, Ordering::Relaxed);
        self.log.from.store(from as u64, Ordering::Relaxed);
        self.log.to.store((from + length) as u64, Ordering::Relaxed);
        self.log.looks.store(false, Ordering::Relaxed);
        self.log.used.store(0, Ordering::Relaxed);
    }

    /// Like `listen`, and reads the first byte in every start callback. That byte must be readable.
    pub(crate) fn listen_and_look(&self, from: usize, length: usize) {
        self.listen(from, length);
        self.log.looks.store(true, Ordering::Relaxed);
    }

    /// Returns the logged callbacks.
    pub(crate) fn heard(&self) -> Vec<Heard> {
        // Stop listening first, because collecting the entries may free memory.
        let from = self.log.from.load(Ordering::Relaxed);
        self.log.to.store(0, Ordering::Relaxed);
        let cells = &self.log.cells[..self.log.used.load(Ordering::Relaxed).min(ROOM)];
        let relative = |at: &AtomicU64| at.load(Ordering::Relaxed).wrapping_sub(from) as i64;
        let heard = cells.iter().map(|cell| {
            let what = cell.what.load(Ordering::Acquire);
            Heard {
                is_start: what >> 8 & 1 == 1,
                event: EVENTS[(what & 0xff) as usize],
                from: relative(&cell.start),
                to: relative(&cell.end),
                content: (what >> 16) as u8,
            }
        });
        heard.collect()
    }

    /// Checks that each of `ranges` was reported before and after as `event`, and that nothing else
    /// was. Brackets nest.
    #[track_caller]
    pub(crate) fn expect(&self, name: &str, event: Event, ranges: &[(i64, i64)]) {
        let heard = self.heard();
        let told: Vec<_> = heard
            .iter()
            .map(|heard| (heard.is_start, heard.event, (heard.from, heard.to)))
            .collect();
        let starts = ranges.iter().map(|range| (true, event, *range));
        let ends = ranges.iter().rev().map(|range| (false, event, *range));
        assert_eq!(told, starts.chain(ends).collect::<Vec<_>>(), "{name}");
    }
}
