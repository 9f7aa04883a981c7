//! The lives of mappings: their addresses, begins and ends.
//!
//! A trace records when mappings are made (`map`), removed (`unmap`) and copied (`fork`). If a
//! change names a mapping whose birth is not in the trace, the mapping is assumed to exist since
//! its address space began.

use std::collections::{BTreeMap, HashMap};

use crate::events;
use crate::intern::Name;
use crate::record::Kind;
use crate::recording::{Born, Changed, Lived, Recording};

/// A mapping, or a part of one, from its birth to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) began: u64,
    pub(super) ended: u64,
    pub(super) what: Option<Name>,
    /// The stack of the call that made the mapping.
    pub(super) site: Option<u32>,
    pub(super) birth: Birth,
    pub(super) fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Birth {
    /// Its birth is not in the trace: assumed to be mapped since the address space began.
    Unseen,
    Mapped,
    /// Copied by a fork.
    Copied,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Unmapped,
    /// Ended with its address space, or still mapped at the end of the trace.
    Kept,
}

/// The end of addresses that a program can map. A range that ends beyond is that of a whole address
/// space, and is not drawn.
pub(super) const TOP: u64 = 1 << 57;

/// Every life of every address space.
pub(super) fn of(recording: &Recording) -> HashMap<u64, Vec<Life>> {
    let mut worlds: HashMap<u64, World> = HashMap::new();
    let mut changes = recording.changes.iter().peekable();
    let mut births = recording.births.iter().peekable();
    let mut life = recording.life.iter().peekable();
    let began = |mm: u64| recording.spaces.get(&mm).map_or(0, |space| space.began);
    loop {
        let changed = changes
            .peek()
            .map_or(u64::MAX, |changed| changed.change.ended);
        let born = births.peek().map_or(u64::MAX, |born| born.t);
        let lived = life.peek().map_or(u64::MAX, |lived| lived.t);
        let next = changed.min(born).min(lived);
        if next == u64::MAX {
            break;
        }
        // A call unmaps before it maps.
        if changed == next {
            if let Some(changed) = changes.next() {
                let world = worlds
                    .entry(changed.mm)
                    .or_insert_with(|| World::new(began(changed.mm)));
                world.changed(changed);
            }
        } else if born == next {
            if let Some(born) = births.next() {
                let world = worlds
                    .entry(born.mm)
                    .or_insert_with(|| World::new(began(born.mm)));
                world.born(born);
            }
        } else if let Some(lived) = life.next() {
            follow(&mut worlds, lived);
        }
    }
    let end = |mm: &u64| {
        recording
            .spaces
            .get(mm)
            .map_or(recording.end, |space| space.ended)
    };
    worlds
        .into_iter()
        .map(|(mm, world)| (mm, world.finish(end(&mm))))
        .collect()
}

fn follow(worlds: &mut HashMap<u64, World>, lived: &Lived) {
    match lived.record.kind {
        // The child of a vfork is in its parent's address space.
        Kind::Fork { child_mm, .. } if child_mm != lived.record.mm => {
            let Some(parent) = worlds.get(&lived.record.mm) else {
                return;
            };
            let copied = |(start, live): (&u64, &Live)| {
                (
                    *start,
                    Live {
                        began: lived.t,
                        birth: Birth::Copied,
                        ..*live
                    },
                )
            };
            let live = parent.live.iter().map(copied).collect();
            let world = World {
                live,
                ..World::new(lived.t)
            };
            // If the trace has a change of the child before the fork, the child's world exists.
            worlds.entry(child_mm).or_insert(world);
        }
        _ => {}
    }
}

/// One address space at one time.
#[derive(Debug)]
struct World {
    began: u64,
    /// The live mappings by their first address; they do not overlap.
    live: BTreeMap<u64, Live>,
    lives: Vec<Life>,
    /// Whether a birth was seen in this address space.
    has_births: bool,
}

#[derive(Clone, Copy, Debug)]
struct Live {
    end: u64,
    began: u64,
    what: Option<Name>,
    site: Option<u32>,
    birth: Birth,
}

impl World {
    fn new(began: u64) -> World {
        World {
            began,
            live: BTreeMap::new(),
            lives: Vec::new(),
            has_births: false,
        }
    }

    fn changed(&mut self, changed: &Changed) {
        let change = &changed.change;
        let (start, end) = (
            change.span.start(),
            u64::try_from(change.span.end()).unwrap_or(u64::MAX),
        );
        if end > TOP || !change.is_done() {
            return;
        }
        self.meet(start, end, changed);
        if change.span.event == events::UNMAP {
            self.unmap(start, end, change.ended);
        }
    }

    /// Adds mappings that must have existed before a call that changes them.
    fn meet(&mut self, start: u64, end: u64, changed: &Changed) {
        let change = &changed.change;
        let is_empty = change.seen.pages.is_some_and(|pages| pages.is_empty());
        // An unmap may name a range without a mapping; a change of protection may not.
        if change.span.event == events::UNMAP && is_empty && self.has_births {
            return;
        }
        let live = Live {
            end,
            began: self.began,
            what: change.seen.what,
            site: None,
            birth: Birth::Unseen,
        };
        let gaps = self.gaps(start, end);
        // `what` names only the first mapping of the range. So if births were seen, only a gap at
        // the start of the range becomes a mapping; otherwise every gap does, under that name.
        let known = gaps
            .iter()
            .filter(|(from, _)| !self.has_births || *from == start);
        for (from, to) in known.copied().collect::<Vec<_>>() {
            self.live.insert(from, Live { end: to, ..live });
        }
    }

    fn born(&mut self, born: &Born) {
        self.has_births = true;
        let range = born.mapping.range;
        let (start, end) = (
            range.start().get(),
            range.end().map_or(u64::MAX, |end| end.get()),
        );
        if end > TOP {
            return;
        }
        // A mapping that exists in the range has grown; a replaced mapping was unmapped before.
        for (from, to) in self.gaps(start, end) {
            let live = Live {
                end: to,
                began: born.t,
                what: born.what,
                site: born.site,
                birth: Birth::Mapped,
            };
            self.live.insert(from, live);
        }
    }

    /// The parts of a range without a live mapping.
    fn gaps(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut at = start;
        let before = self.live.range(..start).next_back();
        for (from, live) in before.into_iter().chain(self.live.range(start..end)) {
            if *from > at {
                gaps.push((at, (*from).min(end)));
            }
            at = at.max(live.end);
        }
        if at < end {
            gaps.push((at, end));
        }
        gaps
    }

    /// Ends the mappings in a range; parts outside the range live on.
    fn unmap(&mut self, start: u64, end: u64, t: u64) {
        let before = self
            .live
            .range(..start)
            .next_back()
            .filter(|(_, live)| live.end > start);
        let first = before.map_or(start, |(from, _)| *from);
        let hit: Vec<u64> = self.live.range(first..end).map(|(from, _)| *from).collect();
        for from in hit {
            let Some(live) = self.live.remove(&from) else {
                continue;
            };
            if from < start {
                self.live.insert(from, Live { end: start, ..live });
            }
            if live.end > end {
                self.live.insert(end, live);
            }
            self.lives.push(life(
                from.max(start),
                live.end.min(end),
                &live,
                t,
                Fate::Unmapped,
            ));
        }
    }

    fn finish(self, t: u64) -> Vec<Life> {
        let World {
            live, mut lives, ..
        } = self;
        lives.extend(
            live.iter()
                .map(|(from, live)| life(*from, live.end, live, t, Fate::Kept)),
        );
        lives
    }
}

fn life(start: u64, end: u64, live: &Live, t: u64, fate: Fate) -> Life {
    let Live {
        began,
        what,
        site,
        birth,
        ..
    } = *live;
    Life {
        start,
        end,
        began,
        ended: t.max(began),
        what,
        site,
        birth,
        fate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lives in a trace of one process. Its steps, a nanosecond apart, are `(kind, first page,
    /// pages)`.
    fn lives(steps: &[(&str, u64, u64)]) -> Vec<(u64, u64, u64, u64, Birth, Fate)> {
        let mut text = String::from(r#"{"v":1,"t":1,"kind":"mm_new","pid":1,"tid":1,"mm":1}"#);
        for (at, (kind, page, pages)) in steps.iter().enumerate() {
            let (t, start, end) = (at + 2, page << 12, (page + pages) << 12);
            let kinds = if *kind == "map" {
                &["map"][..]
            } else {
                &["start", "end"]
            };
            for name in kinds {
                text += &format!(
                    "\n{{\"v\":1,\"t\":{t},\"kind\":\"{name}\",\"pid\":1,\"tid\":1,\"mm\":1,\"event\":\"{kind}\",\"cause\":\"x\",\
                     \"start\":\"{start:#x}\",\"end\":\"{end:#x}\",\"blockable\":true,\"result\":0}}"
                );
            }
        }
        let recording = Recording::read(text.as_bytes()).unwrap();
        let mut lives = of(&recording).remove(&1).unwrap_or_default();
        lives.sort_by_key(|life| (life.start, life.began));
        let row = |life: &Life| {
            (
                life.start >> 12,
                life.end >> 12,
                life.began,
                life.ended,
                life.birth,
                life.fate,
            )
        };
        lives.iter().map(row).collect()
    }

    #[test]
    fn a_mapping_lives_until_its_unmap_and_the_rest_lives_on() {
        let found = lives(&[("map", 10, 10), ("unmap", 12, 2)]);
        assert_eq!(
            found,
            [
                (10, 12, 2, 3, Birth::Mapped, Fate::Kept),
                (12, 14, 2, 3, Birth::Mapped, Fate::Unmapped),
                (14, 20, 2, 3, Birth::Mapped, Fate::Kept)
            ]
        );
    }

    #[test]
    fn a_mapping_without_a_birth_exists_from_the_begin() {
        assert_eq!(
            lives(&[("clear", 5, 1)]),
            [(5, 6, 1, 2, Birth::Unseen, Fate::Kept)]
        );
        assert_eq!(
            lives(&[("unmap", 5, 1), ("unmap", 5, 1)])[0],
            (5, 6, 1, 2, Birth::Unseen, Fate::Unmapped)
        );
    }

    #[test]
    fn a_heap_that_grows_lives_on_and_its_new_part_is_young() {
        let found = lives(&[("map", 1, 2), ("map", 1, 5)]);
        assert_eq!(
            found,
            [
                (1, 3, 2, 3, Birth::Mapped, Fate::Kept),
                (3, 6, 3, 3, Birth::Mapped, Fate::Kept)
            ]
        );
    }

    #[test]
    fn the_release_of_everything_maps_nothing() {
        assert_eq!(lives(&[("release", 0, 1 << 50)]), []);
    }
}
