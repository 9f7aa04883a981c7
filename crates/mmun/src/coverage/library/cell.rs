//! One operation under a library's cache, in a separate process.

use std::time::{Duration, Instant};

use super::cache::{Cache, Held};
use super::ring::{BYTES, Ring};
use super::{libfabric, ucx};
use crate::coverage::cell::open;
use crate::coverage::operation::{Operation, Prepared, Unavailable};
use crate::coverage::region;
use crate::coverage::report::{Report, Seen};
use crate::library::Library;

/// The offset of the bytes in the page, away from the allocator's metadata.
fn inside() -> usize {
    region::page_size() / 2
}

/// How many look-ups may miss before the cache must return the same registration twice in a row.
const TRIES: usize = 8;

/// Registers, changes, looks up again, transfers, and reports whether the bytes reached the page.
pub(crate) fn run(operation: &Operation, library: Library, wait: Duration) -> Report {
    try_run(operation, library, wait)
        .unwrap_or_else(|Unavailable(reason)| Report::unavailable(reason))
}

/// A new cache of the library, and a note for the user.
fn cache(
    library: Library,
    ring: &'static Ring,
) -> Result<(Box<dyn Cache>, Option<String>), Unavailable> {
    Ok(match library {
        Library::Ucx => ucx::open(ring)?,
        Library::Libfabric => (Box::new(libfabric::Cache::open(ring)?), None),
    })
}

fn try_run(operation: &Operation, library: Library, wait: Duration) -> Result<Report, Unavailable> {
    let Prepared {
        watched,
        armed: _,
        change,
    } = (operation.prepare)()?;
    let page = open(operation, watched)?;
    // The ring and the cache are leaked, because this process ends by `_exit`.
    let ring: &'static Ring = Box::leak(Box::new(Ring::new()?));
    let (cache, note) = cache(library, ring)?;
    // Pinning a page may change its translation (the zero page, or a page of a file). Then the
    // cache drops the first registration.
    let look_up = || {
        let held = Held::look_up(&*cache, watched, region::page_size());
        held.map(|held| held.slot)
            .ok_or("the page cannot be registered: the kernel does not pin it")
    };
    let mut last = look_up()?;
    if !(0..TRIES).any(|_| look_up().is_ok_and(|slot| std::mem::replace(&mut last, slot) == slot)) {
        return Err("the cache does not find what it has just registered".into());
    }
    let before = page.state()?;
    change()?;
    let begin = Instant::now();
    let changed = page.state()? != before;
    region::map_if_free(watched)?;
    let target = watched + inside();
    // Clear the page through its mapping. A page that the program may not write keeps its content.
    region::put(target, &[0; BYTES.len()]);
    // Busy wait, because a sleep takes longer than `wait`. Meanwhile other threads report the
    // change.
    while begin.elapsed() < wait {
        std::hint::spin_loop();
    }
    let seen = match Held::look_up(&*cache, watched, region::page_size()) {
        // The cache refused to register the page anew, so no data is transferred.
        None => Seen::Before,
        Some(held) => {
            ring.write(held.slot, target)?;
            let mut bytes = [0; BYTES.len()];
            let is_there = region::get(target, &mut bytes) && bytes == BYTES;
            if is_there { Seen::Before } else { Seen::Missed }
        }
    };
    Ok(Report {
        reason: note.unwrap_or_default(),
        ..Report::told(seen, changed)
    })
}
