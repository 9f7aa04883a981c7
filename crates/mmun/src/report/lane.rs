//! One address space over time, as the page draws it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::bands::{self, Band};
use super::lives::{Birth, Fate, Life};
use super::totals;
use crate::intern::Name;
use crate::recording::{Changed, Space};

/// Addresses are in pages, times in nanoseconds. A text is its index in the page's strings.
#[derive(Debug, Serialize)]
pub(super) struct Lane {
    pub(super) mm: u64,
    pub(super) pid: i32,
    pub(super) comm: u32,
    pub(super) program: u32,
    began: u64,
    ended: u64,
    /// The count of all changes, including those that are not shown one by one.
    changes: usize,
    left_out: (usize, usize),
    /// A row for each band: first page, count of pages, name of the mapping.
    bands: Vec<(u64, u64, u32)>,
    lives: Vec<LifeRow>,
    marks: Vec<Mark>,
    /// Rows over all changes: part of the time, event, calls, time, resident bytes.
    strip: Vec<(usize, usize, u64, u64, u64)>,
    /// For each band, a digit for each part of the time, without the zeros at the end: how full the
    /// band was of lives that are not shown one by one. `haze` has such digits for the count of
    /// changes that are not shown one by one.
    shade: Vec<String>,
    haze: Vec<String>,
}

/// First page, count of pages, begin, end, mapping, stack of the birth (-1: not known), birth,
/// fate.
type LifeRow = (u64, u64, u64, u64, u32, i64, u8, u8);

/// Begin, elapsed time, time in the call, task, its name, call, event, first page, count of pages,
/// resident bytes, mapping, stack, result.
type Mark = (
    u64,
    u64,
    u64,
    i32,
    u32,
    u32,
    usize,
    (u64, u64),
    Option<u64>,
    u32,
    i64,
    Option<i64>,
);

/// The number of parts into which a picture divides the time.
const PARTS: usize = 200;
const PAGE: u64 = 4096;

/// The input of a lane.
pub(super) struct Material<'a> {
    pub(super) mm: u64,
    pub(super) space: Space,
    pub(super) lives: Vec<Life>,
    pub(super) changes: Vec<&'a Changed>,
    /// For each of `changes`, in the same order: whether it is shown one by one.
    pub(super) shown: Vec<bool>,
}

/// Adds texts to the page's strings, and returns their indices.
pub(super) trait Text {
    fn name(&mut self, name: Option<Name>) -> u32;
    fn text(&mut self, text: &str) -> u32;
}

impl Material<'_> {
    /// Makes the lane. Only the `most_lives` heaviest lives are shown one by one.
    pub(super) fn lane(mut self, most_lives: usize, text: &mut impl Text) -> Lane {
        let (began, ended) = (self.space.began, self.space.ended.max(self.space.began + 1));
        let ranges = self
            .changes
            .iter()
            .map(|changed| pages_of(changed))
            .map(|(at, n)| (at * PAGE, (at + n) * PAGE));
        let bands = bands::of(&self.lives, ranges);
        let parts = Parts {
            began,
            length: (ended - began).max(1),
        };
        self.lives.sort_by_key(|life| {
            let weight =
                u128::from(life.end - life.start) * u128::from(life.ended - life.began + 1);
            (std::cmp::Reverse(weight), life.start, life.began)
        });
        let shown_lives = self.lives.len().min(most_lives);
        let (kept, faint) = self.lives.split_at(shown_lives);
        let hidden = self
            .changes
            .iter()
            .zip(&self.shown)
            .filter(|(_, shown)| !**shown)
            .map(|(changed, _)| *changed);
        let hidden: Vec<&Changed> = hidden.collect();
        let shown = self
            .changes
            .iter()
            .zip(&self.shown)
            .filter(|(_, shown)| **shown);
        let mut strip: BTreeMap<(usize, usize), (u64, u64, u64)> = BTreeMap::new();
        for changed in &self.changes {
            let row = strip
                .entry((parts.of(changed.change.began), changed.change.span.event))
                .or_default();
            row.0 += u64::from(changed.change.is_call);
            row.1 = row.1.saturating_add(totals::time(changed));
            row.2 = row.2.saturating_add(if totals::is_removal(changed) {
                changed.change.resident()
            } else {
                0
            });
        }
        Lane {
            mm: self.mm,
            pid: self.space.pid,
            comm: text.name(Some(self.space.comm)),
            program: text.name(Some(self.space.program)),
            began,
            ended,
            changes: self.changes.len(),
            left_out: (hidden.len(), faint.len()),
            marks: shown.map(|(changed, _)| mark(changed, text)).collect(),
            lives: kept.iter().map(|life| life_row(life, text)).collect(),
            strip: strip
                .into_iter()
                .map(|((part, event), (n, time, bytes))| (part, event, n, time, bytes))
                .collect(),
            shade: parts.shade(&bands, faint),
            haze: parts.haze(&bands, &hidden),
            bands: bands
                .iter()
                .map(|b| (b.start / PAGE, (b.end - b.start) / PAGE, text.name(b.what)))
                .collect(),
        }
    }
}

impl Lane {
    /// The stacks of the changes and lives that are shown.
    pub(super) fn sites(&self) -> impl Iterator<Item = i64> {
        self.marks
            .iter()
            .map(|mark| mark.10)
            .chain(self.lives.iter().map(|life| life.5))
    }
}

/// The first page of a range, and its count of pages.
fn pages_of(changed: &Changed) -> (u64, u64) {
    (
        changed.change.span.start() / PAGE,
        changed.change.span.range.pages(),
    )
}

fn mark(changed: &Changed, text: &mut impl Text) -> Mark {
    let change = &changed.change;
    let pages = pages_of(changed);
    let resident = change.seen.pages.map(|pages| pages.resident);
    let cause = text.text(change.span.cause);
    let (comm, what) = (text.name(Some(changed.comm)), text.name(change.seen.what));
    let (time, event) = (totals::time(changed), change.span.event);
    let site = change.seen.site.map_or(-1, i64::from);
    let (wall, tid) = (change.wall(), change.task.tid);
    (
        change.began,
        wall,
        time,
        tid,
        comm,
        cause,
        event,
        pages,
        resident,
        what,
        site,
        change.result,
    )
}

fn life_row(life: &Life, text: &mut impl Text) -> LifeRow {
    let site = life.site.map_or(-1, i64::from);
    let birth = match life.birth {
        Birth::Unseen => 0,
        Birth::Mapped => 1,
        Birth::Copied => 2,
    };
    let fate = u8::from(life.fate == Fate::Unmapped);
    let (page, pages) = (life.start / PAGE, (life.end - life.start) / PAGE);
    (
        page,
        pages,
        life.began,
        life.ended,
        text.name(life.what),
        site,
        birth,
        fate,
    )
}

/// The time of an address space in equal parts.
#[derive(Clone, Copy)]
struct Parts {
    began: u64,
    length: u64,
}

impl Parts {
    fn of(self, t: u64) -> usize {
        let at = u128::from(t.saturating_sub(self.began)) * PARTS as u128 / u128::from(self.length);
        (at as usize).min(PARTS - 1)
    }

    /// How full of these lives each band is in each part of the time, as digits: 9 is full.
    fn shade(self, bands: &[Band], lives: &[Life]) -> Vec<String> {
        if lives.is_empty() {
            return Vec::new();
        }
        let mut grid = vec![[0_f32; PARTS]; bands.len()];
        let part = self.length as f64 / PARTS as f64;
        for life in lives {
            let (first, last) = (self.of(life.began), self.of(life.ended));
            for at in holding(bands, life.start, life.end) {
                let band = bands[at];
                let bytes = band
                    .end
                    .min(life.end)
                    .saturating_sub(band.start.max(life.start));
                let filled = bytes as f64 / (band.end - band.start) as f64;
                for (at, cell) in grid[at].iter_mut().enumerate().take(last + 1).skip(first) {
                    let begin = self.began as f64 + at as f64 * part;
                    let overlap =
                        (life.ended as f64).min(begin + part) - (life.began as f64).max(begin);
                    *cell += (filled * overlap.max(0.0) / part) as f32;
                }
            }
        }
        let digit = |cell: &f32| {
            if *cell > 0.0 {
                (cell * 9.0).ceil().min(9.0) as u8
            } else {
                0
            }
        };
        digits(&grid, digit)
    }

    /// How many of these changes each band has in each part of the time, as digits: each step is a
    /// factor of four.
    fn haze(self, bands: &[Band], changes: &[&Changed]) -> Vec<String> {
        if changes.is_empty() {
            return Vec::new();
        }
        let mut grid = vec![[0_u32; PARTS]; bands.len()];
        for changed in changes {
            let (page, pages) = pages_of(changed);
            for at in holding(bands, page * PAGE, (page + pages) * PAGE) {
                grid[at][self.of(changed.change.began)] += 1;
            }
        }
        digits(&grid, |count| {
            (u32::BITS - count.leading_zeros()).div_ceil(2).min(9) as u8
        })
    }
}

/// The bands that a range touches.
fn holding(bands: &[Band], start: u64, end: u64) -> std::ops::Range<usize> {
    bands.partition_point(|band| band.end <= start)..bands.partition_point(|band| band.start < end)
}

fn digits<T>(grid: &[[T; PARTS]], digit: impl Fn(&T) -> u8) -> Vec<String> {
    let line = |row: &[T; PARTS]| -> String {
        let text: String = row
            .iter()
            .map(|cell| char::from(b'0' + digit(cell)))
            .collect();
        text.trim_end_matches('0').to_owned()
    };
    grid.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_its_part_and_the_last_one_ends_with_the_trace() {
        let parts = Parts {
            began: 1000,
            length: 2000,
        };
        assert_eq!(
            [0, 1000, 1009, 1010, 2999, 3000, 9999].map(|t| parts.of(t)),
            [0, 0, 0, 1, 199, 199, 199]
        );
    }

    #[test]
    fn the_shade_of_a_band_is_the_share_of_its_mappings() {
        let band = |start, end| Band {
            start,
            end,
            what: None,
        };
        let bands = [band(0x1000, 0x3000), band(0x5000, 0x6000)];
        let life = Life {
            start: 0x1000,
            end: 0x2000,
            began: 0,
            ended: 100,
            what: None,
            site: None,
            birth: Birth::Mapped,
            fate: Fate::Kept,
        };
        let shade = Parts {
            began: 0,
            length: 200,
        }
        .shade(&bands, &[life]);
        assert_eq!(shade, ["5".repeat(100), String::new()]);
    }
}
