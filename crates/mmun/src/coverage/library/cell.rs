//! One operation under a library's cache, in a process of its own.

use std::time::{Duration, Instant};

use super::cache::{Cache, Held};
use super::ring::{BYTES, Ring};
use super::{libfabric, ucx};
use crate::coverage::cell::open;
use crate::coverage::operation::{Operation, Prepared, Unavailable};
use crate::coverage::region;
use crate::coverage::report::{Report, Seen};
use crate::library::Library;

/// Where in the page the bytes go: not where an allocator keeps its own.
fn inside() -> usize {
    region::page_size() / 2
}

/// How often a registration is made before it has to be found.
const TRIES: usize = 8;

/// Registers, changes, looks up again, transfers, and says where the bytes arrived.
pub(crate) fn run(operation: &Operation, library: Library, wait: Duration) -> Report {
    try_run(operation, library, wait)
        .unwrap_or_else(|Unavailable(reason)| Report::unavailable(reason))
}

/// A new cache of the library.
fn cache(library: Library, ring: &'static Ring) -> Result<Box<dyn Cache>, Unavailable> {
    Ok(match library {
        Library::Ucx => Box::new(ucx::Cache::open(ring)?),
        Library::Libfabric => Box::new(libfabric::Cache::open(ring)?),
    })
}

fn try_run(operation: &Operation, library: Library, wait: Duration) -> Result<Report, Unavailable> {
    let Prepared {
        watched,
        armed: _,
        change,
    } = (operation.prepare)()?;
    let page = open(operation, watched)?;
    // The ring and the cache stay: this process ends by `_exit`.
    let ring: &'static Ring = Box::leak(Box::new(Ring::new()?));
    let cache = cache(library, ring)?;
    // To pin a page may change its translation (a page of zeros, or of a file): then the first
    // registration is dropped.
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
    // The program writes its own page. One that it may not write stays as it is.
    region::put(target, &[0; BYTES.len()]);
    // Awake: the point is what is told meanwhile by others, and a sleep is never as short as this.
    while begin.elapsed() < wait {
        std::hint::spin_loop();
    }
    let seen = match Held::look_up(&*cache, watched, region::page_size()) {
        // A new registration was refused: nothing is transferred.
        None => Seen::Before,
        Some(held) => {
            ring.write(held.slot, target)?;
            let mut bytes = [0; BYTES.len()];
            let is_there = region::get(target, &mut bytes) && bytes == BYTES;
            if is_there { Seen::Before } else { Seen::Missed }
        }
    };
    Ok(Report::told(seen, changed))
}
