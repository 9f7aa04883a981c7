//! The bands of a picture of an address space: ranges of used addresses, without the gaps between
//! them.

use std::collections::HashMap;

use crate::intern::Name;

use super::lives::Life;

/// A range of addresses. Each band is drawn to scale; two bands may have different scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Band {
    pub(super) start: u64,
    pub(super) end: u64,
    /// The name with the most bytes times lifetime in this band.
    pub(super) what: Option<Name>,
}

/// The maximum number of bands in a picture.
const MAX_BANDS: usize = 240;

/// Bands that hold every life and every range, in order of address.
pub(super) fn of(lives: &[Life], ranges: impl Iterator<Item = (u64, u64)>) -> Vec<Band> {
    let mut edges: Vec<(u64, i64)> = Vec::with_capacity(2 * lives.len());
    let all = lives
        .iter()
        .map(|life| (life.start, life.end))
        .chain(ranges);
    edges.extend(all.flat_map(|(start, end)| [(start, 1), (end, -1)]));
    edges.sort_unstable();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut depth = 0;
    for pair in edges.windows(2) {
        depth += pair[0].1;
        if depth > 0 && pair[0].0 < pair[1].0 {
            runs.push((pair[0].0, pair[1].0));
        }
    }
    let mut least = 4096;
    while runs.len() > MAX_BANDS && least < 1 << 60 {
        runs = join(&runs, least);
        least *= 2;
    }
    name(&runs, lives)
}

/// Joins each range that is shorter than `least` with the next range, if the gap between the two is
/// shorter than `least` as well.
fn join(runs: &[(u64, u64)], least: u64) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.0 - last.1 < least && last.1 - last.0 < least => last.1 = run.1,
            _ => joined.push(*run),
        }
    }
    joined
}

fn name(runs: &[(u64, u64)], lives: &[Life]) -> Vec<Band> {
    let mut weights: Vec<HashMap<Option<Name>, f64>> = vec![HashMap::new(); runs.len()];
    for life in lives {
        let first = runs.partition_point(|run| run.1 <= life.start);
        for (run, weights) in runs
            .iter()
            .zip(&mut weights)
            .skip(first)
            .take_while(|(run, _)| run.0 < life.end)
        {
            let bytes = run.1.min(life.end).saturating_sub(run.0.max(life.start));
            *weights.entry(life.what).or_default() +=
                bytes as f64 * (1 + life.ended - life.began) as f64;
        }
    }
    let heaviest = |weights: &HashMap<Option<Name>, f64>| {
        let best = weights
            .iter()
            .max_by(|a, b| a.1.total_cmp(b.1).then_with(|| b.0.cmp(a.0)));
        best.and_then(|(what, _)| *what)
    };
    let band = |(run, weights): (&(u64, u64), &HashMap<Option<Name>, f64>)| Band {
        start: run.0,
        end: run.1,
        what: heaviest(weights),
    };
    runs.iter().zip(&weights).map(band).collect()
}

#[cfg(test)]
mod tests {
    use super::super::lives::{Birth, Fate};
    use super::*;

    fn life(start: u64, end: u64) -> Life {
        let (what, site) = (None, None);
        Life {
            start,
            end,
            began: 0,
            ended: 9,
            what,
            site,
            birth: Birth::Mapped,
            fate: Fate::Kept,
        }
    }

    fn spans(bands: &[Band]) -> Vec<(u64, u64)> {
        bands.iter().map(|band| (band.start, band.end)).collect()
    }

    #[test]
    fn gaps_are_left_out_and_each_edge_begins_a_band() {
        let bands = of(
            &[life(0x1000, 0x3000), life(0x9000, 0xa000)],
            [(0x2000, 0x4000)].into_iter(),
        );
        let wanted = [
            (0x1000, 0x2000),
            (0x2000, 0x3000),
            (0x3000, 0x4000),
            (0x9000, 0xa000),
        ];
        assert_eq!(spans(&bands), wanted);
    }

    #[test]
    fn many_mappings_share_bands_that_hold_all_of_them() {
        let lives: Vec<Life> = (0..10_000)
            .map(|at| life(at << 20, (at << 20) + 0x2000))
            .collect();
        let bands = of(&lives, std::iter::empty());
        assert!(
            (MAX_BANDS / 4..=MAX_BANDS).contains(&bands.len())
                && bands.is_sorted_by_key(|band| band.start)
        );
        for life in &lives {
            assert!(
                bands
                    .iter()
                    .any(|band| band.start <= life.start && life.end <= band.end)
            );
        }
    }
}
