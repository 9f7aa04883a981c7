//! A list of calls and what each should be seen as.

use crate::sys;

/// What a call should be seen as: `cause event start end result`.
pub(crate) struct Script {
    /// Named before the first call and after the last, so that everything between is the script's.
    marker: u64,
    lines: Vec<(&'static str, &'static str, u64, u64, i64)>,
}

impl Script {
    /// Allocates all it will need, so that nothing of the allocator's mixes with the calls.
    pub(crate) fn new() -> Script {
        let script = Script {
            marker: sys::map(sys::PAGE, libc::PROT_READ | libc::PROT_WRITE),
            lines: Vec::with_capacity(128),
        };
        // What Rust allocates for the first line printed.
        println!("# {:#x}", script.marker);
        script.mark();
        script
    }

    /// Makes a call that nothing else makes, whatever the loader or the allocator do with the same
    /// address.
    fn mark(&self) {
        const NO_SUCH_ADVICE: u64 = 12_345;
        let refused = sys::call(libc::SYS_madvise, &[self.marker, sys::PAGE, NO_SUCH_ADVICE]);
        assert_eq!(refused, -i64::from(libc::EINVAL));
    }

    /// Says that the call which returned `result` is seen as this.
    pub(crate) fn seen(
        &mut self,
        cause: &'static str,
        event: &'static str,
        start: u64,
        length: u64,
        result: i64,
    ) {
        self.lines
            .push((cause, event, start, start + length, result));
    }

    pub(crate) fn unmap(&mut self, cause: &'static str, start: u64, length: u64, result: i64) {
        self.seen(cause, "unmap", start, length, result);
    }

    /// Prints it.
    pub(crate) fn finish(self) {
        self.mark();
        for (cause, event, start, end, result) in &self.lines {
            println!("{cause} {event} {start:#x} {end:#x} {result}");
        }
    }
}
