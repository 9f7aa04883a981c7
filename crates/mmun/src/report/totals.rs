//! Totals over every change of a trace, shown or not, except the ends of address spaces.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::Serialize;

use crate::change::Shares;
use crate::events;
use crate::intern::Name;
use crate::recording::{Changed, Recording};

/// The totals in the page: calls, bytes of ranges, resident bytes, nanoseconds, the longest call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Sum(u64, u64, u64, u64, u64);

impl Sum {
    fn add(&mut self, changed: &Changed) {
        self.add_amounts(changed);
        self.took(time(changed));
    }

    /// Adds all totals but the time.
    fn add_amounts(&mut self, changed: &Changed) {
        let change = &changed.change;
        let is_removal = is_removal(changed);
        self.0 += u64::from(change.is_call);
        self.1 = self
            .1
            .saturating_add(if is_removal { change.bytes() } else { 0 });
        self.2 = self
            .2
            .saturating_add(if is_removal { change.resident() } else { 0 });
    }

    fn took(&mut self, time: u64) {
        self.3 = self.3.saturating_add(time);
        self.4 = self.4.max(time);
    }

    pub(super) fn of(changed: &Changed) -> Sum {
        let mut sum = Sum::default();
        sum.add(changed);
        sum
    }

    pub(super) fn time(&self) -> u64 {
        self.3
    }

    /// The largest share of `whole` that this sum has in any of the totals.
    pub(super) fn share(&self, whole: &Sum) -> f64 {
        let share = |part: u64, whole: u64| {
            if whole == 0 {
                0.0
            } else {
                part as f64 / whole as f64
            }
        };
        let shares = [
            share(self.0, whole.0),
            share(self.1, whole.1),
            share(self.2, whole.2),
            share(self.3, whole.3),
        ];
        shares.into_iter().fold(0.0, f64::max)
    }
}

/// Whether the change is an unmap or a clear that succeeded. The end of an address space is
/// neither.
pub(super) fn is_removal(changed: &Changed) -> bool {
    matches!(changed.change.span.event, events::UNMAP | events::CLEAR) && changed.change.is_done()
}

/// The time in the call itself; the elapsed time if that is not known. If a call has several
/// ranges, all of them but one have the time 0.
pub(super) fn time(changed: &Changed) -> u64 {
    let change = &changed.change;
    if change.is_call {
        change.own.unwrap_or_else(|| change.wall())
    } else {
        0
    }
}

/// The totals by place in the code, by stack, by time and by size.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) all: Sum,
    /// By place, with the system calls and the stacks of the place.
    pub(super) places: BTreeMap<String, Place>,
    /// By stack, call and mapping.
    pub(super) leaves: HashMap<Leaf, Sum>,
    /// Calls by the power of two of their time, and by event.
    pub(super) times: BTreeMap<(u32, usize), u64>,
    /// Removals by event and by the half powers of two of their range and resident bytes.
    pub(super) sizes: BTreeMap<(usize, u32, u32), Sum>,
    pub(super) tasks: usize,
    /// Unmaps and clears whose size in memory is known, and those of them that failed or found
    /// nothing in memory.
    pub(super) removals: (u64, u64),
    /// Whether the times are those in the calls themselves.
    pub(super) is_own: bool,
}

#[derive(Debug, Default)]
pub(super) struct Place {
    pub(super) sum: Sum,
    pub(super) causes: BTreeSet<&'static str>,
    pub(super) sites: BTreeSet<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Leaf {
    pub(super) site: Option<u32>,
    pub(super) cause: &'static str,
    pub(super) what: Option<Name>,
}

pub(super) fn of(recording: &Recording) -> Totals {
    let mut totals = Totals::default();
    let mut places: HashMap<Option<u32>, String> = HashMap::new();
    let mut tasks = BTreeSet::new();
    let mut shares = Shares::default();
    // The end of an address space is not a call of the program.
    for changed in recording
        .changes
        .iter()
        .filter(|changed| changed.change.span.event != events::RELEASE)
    {
        let change = &changed.change;
        let seen = change.seen;
        totals.all.add(changed);
        totals.is_own |= change.own.is_some();
        tasks.insert(change.task.tid);
        let place = places
            .entry(seen.site)
            .or_insert_with(|| recording.stacks.place(seen.site));
        if !totals.places.contains_key(place) {
            totals.places.insert(place.clone(), Place::default());
        }
        if let Some(place) = totals.places.get_mut(place) {
            place.sum.add(changed);
            place.causes.insert(change.span.cause);
            place.sites.extend(seen.site);
        }
        let leaf = Leaf {
            site: seen.site,
            cause: change.span.cause,
            what: seen.what,
        };
        totals.leaves.entry(leaf).or_default().add_amounts(changed);
        let leaves = &mut totals.leaves;
        shares.take(change, time(changed), |what, share| {
            leaves.entry(Leaf { what, ..leaf }).or_default().took(share);
        });
        if change.is_call {
            *totals
                .times
                .entry((power(time(changed)), change.span.event))
                .or_default() += 1;
        }
        let Some(pages) = seen
            .pages
            .filter(|_| matches!(change.span.event, events::UNMAP | events::CLEAR))
            .filter(|_| !change.is_cut())
        else {
            continue;
        };
        totals.removals.0 += 1;
        totals.removals.1 += u64::from(change.failed() || pages.is_empty());
        if change.is_done() {
            let cell = (
                change.span.event,
                half_power(change.bytes()),
                half_power(change.resident()),
            );
            totals.sizes.entry(cell).or_default().add(changed);
        }
    }
    totals.tasks = tasks.len();
    totals
}

/// The exponent of the smallest power of two above a number: 1 has 1, 2 and 3 have 2. 0 has 0.
fn power(number: u64) -> u32 {
    u64::BITS - number.leading_zeros()
}

/// Like [`power`], with two steps for each power of two; 0 has 0.
fn half_power(number: u64) -> u32 {
    match power(number) {
        0 => 0,
        1 => 2,
        power => 2 * power + u32::from(number >> (power - 2) & 1 != 0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::lives;
    use super::*;

    #[test]
    fn a_recording_may_claim_any_number_of_bytes() {
        let most = u64::MAX;
        let line = |kind: &str| {
            format!(
                "{{\"v\":1,\"t\":2,\"kind\":\"{kind}\",\"pid\":1,\"tid\":1,\"mm\":1,\"event\":\"unmap\",\"cause\":\"munmap\",\
                 \"start\":\"0x1000\",\"end\":\"0x2000\",\"blockable\":true,\"what\":\"heap\",\"result\":0,\
                 \"resident\":{most},\"file\":{most},\"huge\":{most},\"swapped\":{most}}}\n"
            )
        };
        let text = line("start") + &line("end");
        let recording = Recording::read(text.as_bytes()).expect("it is a trace");
        assert_eq!(of(&recording).removals, (1, 0));
        assert_eq!(lives::of(&recording)[&1].len(), 1);
    }

    #[test]
    fn numbers_fall_into_powers_and_halves_of_them() {
        assert_eq!([0, 1, 2, 3, 4, u64::MAX].map(power), [0, 1, 2, 2, 3, 64]);
        assert_eq!(
            [0, 1, 2, 3, 4, 5, 6, 7, 8].map(half_power),
            [0, 2, 4, 5, 6, 6, 7, 7, 8]
        );
    }
}
