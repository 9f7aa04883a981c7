//! One operation under one source of this process, in a separate process.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use mmu_notifier::Registration;

use super::armed::Armed;
use super::operation::{Operation, Prepared, Unavailable};
use super::page::{Page, State};
use super::report::{Report, Seen};
use super::witness::Witness;
use crate::source::Source;

/// Prepares, arms, makes the change, and reports when the source saw it.
pub(crate) fn run(operation: &Operation, source: Source) -> Report {
    try_run(operation, source).unwrap_or_else(|Unavailable(reason)| Report::unavailable(reason))
}

fn try_run(operation: &Operation, source: Source) -> Result<Report, Unavailable> {
    let Prepared {
        watched,
        armed,
        change,
    } = (operation.prepare)()?;
    let page = open(operation, watched)?;
    let shows_frames = page.shows_frames();
    let armed = Armed::new(source, armed)?;
    let witness = Registration::new(&armed.mm(), Witness::new(page))
        .map_err(|error| Unavailable(format!("subscribing: {error}")))?;
    // Callbacks for the preparation do not count.
    armed.settle()?;
    let (at_first, before) = at_rest(|| armed.generation(), || armed.quiesce(), witness.page())?;
    witness.begin(before);
    let mut changed = Ok(false);
    let ahead = watch_beside(
        || armed.generation(),
        witness.page(),
        (at_first, before),
        || {
            changed = change().and_then(|()| Ok(witness.page().state()? != before));
        },
    );
    let changed = changed?;
    armed.settle()?;
    let seen = match witness.seen() {
        // The counter moves before the callback runs, so a reader of the counter learns of the
        // change first.
        Some(_) if armed.generation().is_some() => {
            if ahead {
                Seen::After
            } else {
                Seen::Before
            }
        }
        Some(seen) => seen,
        None => Seen::Missed,
    };
    if !changed && !shows_frames {
        return Err("only root is shown whether the frame changed".into());
    }
    Ok(Report::told(seen, changed))
}

/// The page that will change, as `/proc` shows it.
pub(crate) fn open(operation: &Operation, watched: usize) -> Result<Page, Unavailable> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    Page::open(pid, watched, operation.judge).map_err(Unavailable)
}

/// The source's counter and the state of the page at one moment, with no change under way.
///
/// The kernel may move the page by itself. If such a move begins between the two reads of the
/// counter, the counter and the state belong to different moments. The reads then differ, and are
/// repeated. If the move has begun before, `quiesce` waits for its end: otherwise the state would
/// be that of a page on its way. Either case would look like a change that was not counted.
fn at_rest(
    generation: impl Fn() -> Option<u64>,
    quiesce: impl Fn() -> Result<(), Unavailable>,
    page: &Page,
) -> Result<(Option<u64>, State), Unavailable> {
    loop {
        let counted = generation();
        quiesce()?;
        let state = page.state()?;
        if generation() == counted {
            return Ok((counted, state));
        }
        thread::yield_now();
    }
}

/// Runs `change`, and returns whether a reader ever saw the changed translation together with the
/// old value of the source's counter; `false` if the source has no counter.
///
/// During the change, a thread repeatedly reads the state of the page and then the counter. If the
/// counter moves first, as it must, the thread never sees a changed page with the old count. This
/// check can refute the order but not prove it: a change may take less time than one read, or it
/// may block readers of `/proc`.
fn watch_beside(
    generation: impl Fn() -> Option<u64> + Sync,
    page: &Page,
    (at_first, before): (Option<u64>, State),
    change: impl FnOnce(),
) -> bool {
    if at_first.is_none() {
        change();
        return false;
    }
    // Relaxed: the flag publishes no data, and one read more or less does not matter.
    let (over, started) = (AtomicBool::new(false), Barrier::new(2));
    thread::scope(|scope| {
        let looker = scope.spawn(|| {
            started.wait();
            loop {
                let last = over.load(Relaxed);
                let now = page.state();
                if now.is_ok_and(|now| now != before) && generation() == at_first {
                    return true;
                }
                if last {
                    return false;
                }
            }
        });
        started.wait();
        change();
        over.store(true, Relaxed);
        looker.join().unwrap_or(true)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::super::page::Judge;
    use super::super::region::Region;
    use super::*;

    /// Whether `watch_beside` finds the counter late. With `moves_first` the counter moves before
    /// the page is discarded, otherwise after that.
    fn looks_late(moves_first: bool) -> bool {
        let region = Region::anonymous(1).unwrap();
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let page = Page::open(pid, region.page(0), Judge::Frame).unwrap();
        let (counter, looks) = (AtomicU64::new(7), AtomicU64::new(0));
        let generation = || {
            looks.fetch_add(1, Relaxed);
            Some(counter.load(Relaxed))
        };
        let discard = || region.advise(libc::MADV_DONTNEED).unwrap();
        watch_beside(
            generation,
            &page,
            at_rest(|| Some(7), || Ok(()), &page).unwrap(),
            || {
                if moves_first {
                    counter.fetch_add(1, Relaxed);
                    return discard();
                }
                discard();
                // The counter is read only after the page was seen changed.
                while looks.load(Relaxed) == 0 {
                    thread::yield_now();
                }
                counter.fetch_add(1, Relaxed);
            },
        )
    }

    #[test]
    fn a_page_that_moves_before_the_change_does_not_count() {
        let region = Region::anonymous(1).unwrap();
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let page = Page::open(pid, region.page(0), Judge::Frame).unwrap();
        let (counter, moves) = (AtomicU64::new(7), AtomicBool::new(true));
        // The kernel moves the page, and counts the move, just before the counter is first read.
        let generation = || {
            if moves.swap(false, Relaxed) {
                counter.fetch_add(1, Relaxed);
                region.advise(libc::MADV_DONTNEED).unwrap();
            }
            Some(counter.load(Relaxed))
        };
        let begin = at_rest(generation, || Ok(()), &page).unwrap();
        assert!(!watch_beside(generation, &page, begin, || ()));
    }

    #[test]
    fn a_page_on_its_way_is_waited_for() {
        let region = Region::anonymous(1).unwrap();
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let page = Page::open(pid, region.page(0), Judge::Frame).unwrap();
        // The kernel has taken the page away and counted the move. `arrive` ends the move.
        region.advise(libc::MADV_DONTNEED).unwrap();
        let arrive = || {
            region.touch();
            Ok(())
        };
        let begin = at_rest(|| Some(7), arrive, &page).unwrap();
        assert!(!watch_beside(|| Some(7), &page, begin, || ()));
    }

    #[test]
    fn a_counter_that_moves_after_the_change_is_detected() {
        assert!(looks_late(false));
    }

    #[test]
    fn a_counter_that_moves_before_the_change_is_accepted() {
        for _ in 0..100 {
            assert!(!looks_late(true));
        }
    }
}
