//! A list of calls, and how the tracer should report each of them.

use crate::sys;

/// The expected reports, each of the form `cause event start end result`.
pub(crate) struct Script {
    /// The address of the marker call, which is made before the first and after the last call of
    /// the script. Every call between these two belongs to the script.
    marker: u64,
    lines: Vec<(&'static str, &'static str, u64, u64, i64)>,
}

impl Script {
    /// Allocates everything in advance, so that the allocator makes no call between the script's
    /// calls.
    pub(crate) fn new() -> Script {
        let script = Script {
            marker: sys::map(sys::page_size(), libc::PROT_READ | libc::PROT_WRITE),
            lines: Vec::with_capacity(128),
        };
        // The first line that is printed makes Rust allocate its buffer.
        println!("# {:#x}", script.marker);
        script.mark();
        script
    }

    /// Makes a call that no other code makes, even if the loader or the allocator uses the same
    /// address.
    fn mark(&self) {
        const NO_SUCH_ADVICE: u64 = 12_345;
        let refused = sys::call(
            libc::SYS_madvise,
            &[self.marker, sys::page_size(), NO_SUCH_ADVICE],
        );
        assert_eq!(refused, -i64::from(libc::EINVAL));
    }

    /// Records how the call that returned `result` should be reported.
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

    /// Prints the list.
    pub(crate) fn finish(self) {
        self.mark();
        for (cause, event, start, end, result) in &self.lines {
            println!("{cause} {event} {start:#x} {end:#x} {result}");
        }
    }
}
