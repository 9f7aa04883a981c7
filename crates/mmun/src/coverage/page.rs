//! The kernel's view of one page: its frame, and the state of the frame.
//!
//! Callbacks read the state as well, possibly in the middle of `free`: reading it allocates nothing
//! and takes no lock.

use std::fs::File;
use std::io;

use mmu_source::process::Pid;

use super::region;

/// The part of a page's state whose difference means that the translation has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judge {
    /// Whether the page is present, and its frame: `/proc/PID/pagemap`.
    Frame,
    /// As `Frame`, and whether the frame is mapped exclusively. Once a child shares the frame, a
    /// write must fault.
    Exclusive,
    /// Whether the kernel may drop the frame without saving it (`MADV_FREE`): `/proc/kpageflags`.
    /// The frame itself stays until memory is short.
    Lazy,
    /// Whether a write succeeds.
    Writable,
}

/// The state of a page at one moment. If two states differ, the translation has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State(pub(crate) [u64; 2]);

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;
const FRAME: u64 = (1 << 55) - 1;
/// The flag in `/proc/kpageflags` for a page that must be saved before it is dropped.
const SWAP_BACKED: u64 = 1 << 14;

/// One page of one process.
#[derive(Debug)]
pub(crate) struct Page {
    pid: Pid,
    address: usize,
    judge: Judge,
    pagemap: File,
    flags: Option<File>,
}

impl Page {
    /// The page at `address` of process `pid`.
    ///
    /// # Errors
    /// `/proc` does not show the state that `judge` needs: one line with the reason.
    pub(crate) fn open(pid: Pid, address: usize, judge: Judge) -> Result<Page, String> {
        let open = |name: String| {
            File::open(&name)
                .map_err(|error| format!("{name} cannot be read: {}", crate::reason(&error)))
        };
        let pagemap = open(format!("/proc/{pid}/pagemap"))?;
        let flags = if judge == Judge::Lazy {
            Some(open("/proc/kpageflags".to_owned())?)
        } else {
            None
        };
        Ok(Page {
            pid,
            address,
            judge,
            pagemap,
            flags,
        })
    }

    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// The state now.
    ///
    /// # Errors
    /// The errors of reading below `/proc`.
    pub(crate) fn state(&self) -> io::Result<State> {
        let entry = word(&self.pagemap, self.address / region::page_size())?;
        let shown = match self.judge {
            Judge::Exclusive => PRESENT | SWAPPED | FILE | FRAME | EXCLUSIVE,
            _ => PRESENT | SWAPPED | FILE | FRAME,
        };
        let more = match (self.judge, &self.flags) {
            (Judge::Lazy, Some(flags)) if entry & PRESENT != 0 => {
                let frame = usize::try_from(entry & FRAME).expect("a frame number is an index");
                word(flags, frame)? & SWAP_BACKED
            }
            (Judge::Writable, _) => u64::from(region::takes_a_write(self.pid, self.address)),
            _ => 0,
        };
        Ok(State([entry & shown, more]))
    }

    /// Whether this process may read frame numbers; unprivileged processes read zeros. Also `true`
    /// if the page is not present, because its entry has no frame number then.
    pub(crate) fn shows_frames(&self) -> bool {
        self.state()
            .is_ok_and(|State([entry, _])| entry & PRESENT == 0 || entry & FRAME != 0)
    }
}

/// The word at `index`.
fn word(file: &File, index: usize) -> io::Result<u64> {
    let mut bytes = [0; 8];
    match rustix::io::pread(file, &mut bytes, index as u64 * 8)? {
        8 => Ok(u64::from_ne_bytes(bytes)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::region::Region;
    use super::*;

    fn page(region: &Region, judge: Judge) -> Result<Page, String> {
        Page::open(
            rustix::process::getpid().as_raw_nonzero().get(),
            region.page(0),
            judge,
        )
    }

    #[test]
    fn a_page_that_is_not_changed_stays_the_same_and_a_discarded_one_does_not() {
        let region = Region::anonymous(1).unwrap();
        for judge in [Judge::Frame, Judge::Exclusive] {
            region.touch();
            let page = page(&region, judge).unwrap();
            let before = page.state().unwrap();
            assert_eq!(page.state().unwrap(), before);
            region.advise(libc::MADV_DONTNEED).unwrap();
            assert_ne!(page.state().unwrap(), before);
        }
    }

    #[test]
    fn protection_is_seen_and_reading_the_state_changes_nothing() {
        let region = Region::anonymous(1).unwrap();
        let (page, frame) = (
            page(&region, Judge::Writable).unwrap(),
            page(&region, Judge::Frame).unwrap(),
        );
        let (writable, there) = (page.state().unwrap(), frame.state().unwrap());
        assert_eq!(page.state().unwrap(), writable);
        region.protect().unwrap();
        assert_ne!(page.state().unwrap(), writable);
        assert_eq!(frame.state().unwrap(), there);
    }

    #[test]
    fn a_page_given_up_by_advice_is_seen_by_root() {
        // Only root can read this state.
        if page(&Region::anonymous(64).unwrap(), Judge::Lazy).is_err() {
            assert!(!rustix::process::geteuid().is_root());
            return;
        }
        // The kernel skips pages that wait in another processor's batch: this thread may have moved
        // to another processor since it touched them. So each attempt has new pages.
        let is_seen = (0..1000).any(|_| {
            let region = Region::anonymous(64).unwrap();
            let page = page(&region, Judge::Lazy).unwrap();
            let before = page.state().unwrap();
            region.advise(libc::MADV_FREE).unwrap();
            page.state().unwrap() != before
        });
        assert!(is_seen);
    }
}
