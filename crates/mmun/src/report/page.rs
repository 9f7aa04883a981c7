//! The page: one self-contained file of HTML.
//!
//! The data is in a block that browsers do not run. The page's policy allows the script and the
//! style by their hashes, and forbids everything else (`default-src 'none'`). Names of files and
//! functions come from the traced program, which may be hostile, so `<` is escaped in the data.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;

use super::lane::{Lane, Material, Text};
use super::lives;
use super::totals::{self, Leaf, Sum};
use crate::events;
use crate::intern::{Name, Names};
use crate::recording::{Changed, Recording};

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = concat!(
    include_str!("page/base.js"),
    include_str!("page/map.js"),
    include_str!("page/charts.js"),
    include_str!("page/flame.js"),
);
/// SHA-256 of [`STYLE`] and [`SCRIPT`] in base64: a browser runs no other script. A test compares
/// the hashes with the files.
const STYLE_HASH: &str = "g8P5twbHbM9i2eCKP0QgC+7dqd6ut/9d9buQc1Zx8/0=";
const SCRIPT_HASH: &str = "T84vndEp0pwP8i40cpDvgsysMKK/Y89rjS6EPR4yiUg=";

/// The maximum number of changes that are shown one by one. The heaviest changes are shown; the
/// totals include all changes.
const MOST_CHANGES: usize = 20_000;
const MOST_LIVES: usize = 20_000;
/// The maximum number of address spaces with a picture.
const MOST_LANES: usize = 48;
const MOST_PLACES: usize = 1_000;
const MOST_LEAVES: usize = 6_000;

#[derive(Serialize)]
struct Data<'a> {
    title: String,
    end: u64,
    is_own: bool,
    has_stacks: bool,
    has_births: bool,
    all: Sum,
    tasks: usize,
    spaces: usize,
    removals: (u64, u64),
    unfinished: usize,
    /// Stacks that may lack frames.
    partial: usize,
    left_out: LeftOut,
    events: [&'static str; events::NAMES.len()],
    lanes: Vec<Lane>,
    /// Place, sum, calls, stacks.
    places: Vec<(u32, Sum, Vec<u32>, Vec<u32>)>,
    /// Stack (-1: not known), call, mapping, sum.
    leaves: Vec<(i64, u32, u32, Sum)>,
    /// Power of two of the time, event, calls.
    times: Vec<(u32, usize, u64)>,
    /// Event, half power of two of the range, the same of the resident bytes, sum.
    sizes: Vec<(usize, u32, u32, Sum)>,
    /// Function, module, line; whether the function has a name.
    frames: Vec<(u32, u32, u32, bool)>,
    /// For the index of each stack: the index of the place, and the frames, the innermost first.
    stacks: BTreeMap<u32, (usize, Vec<u32>)>,
    strings: Vec<&'a str>,
}

/// How many changes and lives are not shown one by one, and how many address spaces, places and
/// leaves are left out.
#[derive(Debug, Default, Serialize)]
struct LeftOut {
    changes: usize,
    lives: usize,
    lanes: usize,
    places: usize,
    leaves: usize,
}

/// The strings of the page; index 0 stands for an unknown text.
struct Strings<'a> {
    all: Names,
    recorded: &'a Names,
}

impl Text for Strings<'_> {
    fn name(&mut self, name: Option<Name>) -> u32 {
        name.map_or(0, |name| self.all.number(self.recorded.text(name)).index())
    }

    fn text(&mut self, text: &str) -> u32 {
        self.all.number(text).index()
    }
}

/// Makes the page.
pub(super) fn make(recording: &Recording) -> Vec<u8> {
    let mut all = Names::default();
    all.number("");
    let mut strings = Strings {
        all,
        recorded: &recording.names,
    };
    let totals = totals::of(recording);
    let mut left_out = LeftOut::default();
    let lanes = lanes(recording, &totals.all, &mut strings, &mut left_out);

    let mut places: Vec<_> = totals.places.iter().collect();
    places.sort_by_key(|(place, of)| (Reverse(of.sum.time()), *place));
    left_out.places = places.len().saturating_sub(MOST_PLACES);
    places.truncate(MOST_PLACES);
    let places = places.into_iter().map(|(place, of)| {
        let causes = of.causes.iter().map(|cause| strings.text(cause)).collect();
        (
            strings.text(place),
            of.sum,
            causes,
            of.sites.iter().copied().collect(),
        )
    });
    let places: Vec<(u32, Sum, Vec<u32>, Vec<u32>)> = places.collect();

    let mut leaves: Vec<(&Leaf, &Sum)> = totals.leaves.iter().collect();
    leaves.sort_by(|(a, a_sum), (b, b_sum)| {
        b_sum
            .share(&totals.all)
            .total_cmp(&a_sum.share(&totals.all))
            .then_with(|| a.cmp(b))
    });
    left_out.leaves = leaves.len().saturating_sub(MOST_LEAVES);
    leaves.truncate(MOST_LEAVES);
    let leaves = leaves.into_iter().map(|(leaf, sum)| {
        let site = leaf.site.map_or(-1, i64::from);
        (
            site,
            strings.text(leaf.cause),
            strings.name(leaf.what),
            *sum,
        )
    });
    let leaves: Vec<(i64, u32, u32, Sum)> = leaves.collect();

    let wanted = wanted_stacks(&lanes, &leaves);
    let mut frames: Vec<(u32, u32, u32, bool)> = Vec::new();
    let mut numbers: HashMap<(u32, u32, u32, bool), u32> = HashMap::new();
    let mut stacks = BTreeMap::new();
    for (number, stack) in recording.stacks.all() {
        if !wanted.contains(&i64::from(number)) {
            continue;
        }
        let mut frame = |frame: &crate::stacks::Frame| {
            let module = strings.text(&frame.module);
            let frame = (
                strings.text(&frame.function),
                module,
                strings.text(&frame.line),
                frame.has_name,
            );
            *numbers.entry(frame).or_insert_with(|| {
                frames.push(frame);
                frames.len() as u32 - 1
            })
        };
        stacks.insert(
            number,
            (stack.place, stack.frames.iter().map(&mut frame).collect()),
        );
    }
    let data = Data {
        title: title(recording, &lanes),
        end: recording.end,
        is_own: totals.is_own,
        has_stacks: !recording.stacks.is_empty(),
        has_births: !recording.births.is_empty(),
        all: totals.all,
        tasks: totals.tasks,
        spaces: recording.spaces.len(),
        removals: totals.removals,
        unfinished: recording.unfinished,
        partial: recording.stacks.partial(),
        left_out,
        events: events::NAMES,
        lanes,
        places,
        leaves,
        times: totals
            .times
            .iter()
            .map(|((power, event), calls)| (*power, *event, *calls))
            .collect(),
        sizes: totals
            .sizes
            .iter()
            .map(|((event, range, bytes), sum)| (*event, *range, *bytes, *sum))
            .collect(),
        frames,
        stacks,
        strings: strings.all.iter().collect(),
    };
    assemble(&data)
}

/// The address spaces that get a picture, those with most changes first.
fn lanes(
    recording: &Recording,
    all: &Sum,
    strings: &mut Strings<'_>,
    left_out: &mut LeftOut,
) -> Vec<Lane> {
    let mut lives = lives::of(recording);
    let mut changes: HashMap<u64, Vec<(&Changed, f64)>> = HashMap::new();
    for changed in recording.changes.iter().filter(|changed| is_drawn(changed)) {
        let share = Sum::of(changed).share(all);
        changes
            .entry(changed.mm)
            .or_default()
            .push((changed, share));
    }
    let mut spaces: Vec<_> = recording
        .spaces
        .iter()
        .filter(|(mm, _)| changes.contains_key(mm))
        .collect();
    spaces.sort_by_key(|(mm, _)| (Reverse(changes[mm].len()), **mm));
    left_out.lanes = spaces.len().saturating_sub(MOST_LANES);
    spaces.truncate(MOST_LANES);
    let mut shares: Vec<f64> = spaces
        .iter()
        .flat_map(|(mm, _)| changes[mm].iter().map(|(_, share)| *share))
        .collect();
    shares.sort_by(|a, b| b.total_cmp(a));
    let mut chosen = Chosen::new(&shares, MOST_CHANGES);
    let drawn_lives: usize = spaces
        .iter()
        .map(|(mm, _)| lives.get(mm).map_or(0, Vec::len))
        .sum();
    let lane = |(mm, space): (&u64, &crate::recording::Space)| {
        let changes = changes.remove(mm).unwrap_or_default();
        let lives = lives.remove(mm).unwrap_or_default();
        // Each address space gets its share of the maximum.
        let most = if drawn_lives > MOST_LIVES {
            lives.len() * MOST_LIVES / drawn_lives
        } else {
            lives.len()
        };
        left_out.lives += lives.len() - most;
        let shown: Vec<bool> = changes
            .iter()
            .map(|(_, share)| chosen.has(*share))
            .collect();
        left_out.changes += shown.iter().filter(|shown| !**shown).count();
        let changes = changes.into_iter().map(|(changed, _)| changed).collect();
        Material {
            mm: *mm,
            space: *space,
            lives,
            changes,
            shown,
        }
        .lane(most, strings)
    };
    spaces.into_iter().map(lane).collect()
}

/// Selects the heaviest of many weights. If only a part of several equal weights can be selected,
/// the selected ones are spread evenly, because a loop makes thousands of calls of equal weight.
struct Chosen {
    least: f64,
    /// How many weights equal `least`, how many of these are selected, and how many were queried.
    equal: usize,
    room: usize,
    asked: usize,
}

impl Chosen {
    /// Selects at most `most` of `weights`, which are sorted, the heaviest first.
    fn new(weights: &[f64], most: usize) -> Chosen {
        let least = weights.get(most).copied().unwrap_or(-1.0);
        let heavier = weights.iter().take_while(|weight| **weight > least);
        let heavier = heavier.count();
        let rest = weights[heavier..].iter();
        let equal = rest.take_while(|weight| **weight == least).count();
        Chosen {
            least,
            equal,
            room: most.saturating_sub(heavier),
            asked: 0,
        }
    }

    /// Whether a weight is selected. Must be called once for each weight.
    fn has(&mut self, weight: f64) -> bool {
        if weight != self.least {
            return weight > self.least;
        }
        let before = self.asked * self.room / self.equal.max(1);
        self.asked += 1;
        self.asked * self.room / self.equal.max(1) != before
    }
}

fn is_drawn(changed: &Changed) -> bool {
    changed.change.span.range.last().get() < lives::TOP
}

/// The stacks of all shown changes, lives and leaves.
fn wanted_stacks(lanes: &[Lane], leaves: &[(i64, u32, u32, Sum)]) -> HashSet<i64> {
    let in_lanes = lanes.iter().flat_map(Lane::sites);
    in_lanes.chain(leaves.iter().map(|leaf| leaf.0)).collect()
}

/// The title: the program of the address space with most changes. If no address space has a
/// picture, the program of the last address space.
fn title(recording: &Recording, lanes: &[Lane]) -> String {
    let most = lanes
        .first()
        .and_then(|lane| recording.spaces.get(&lane.mm));
    let Some(space) = most.or_else(|| recording.spaces.values().next_back()) else {
        return "a trace".into();
    };
    let program = recording
        .names
        .text(space.program)
        .rsplit('/')
        .next()
        .unwrap_or_default();
    if program.is_empty() {
        recording.names.text(space.comm).to_owned()
    } else {
        program.to_owned()
    }
}

fn assemble(data: &Data<'_>) -> Vec<u8> {
    let json = serde_json::to_string(data).expect("numbers and texts are JSON");
    // In JSON, `<` occurs only inside strings.
    let json = json.replace('<', "\\u003c");
    let title = data.title.replace('&', "&amp;").replace('<', "&lt;");
    let mut page = Vec::with_capacity(json.len() + PAGE.len() + STYLE.len() + SCRIPT.len());
    let mut rest = PAGE;
    let parts = [
        ("{style-hash}", STYLE_HASH),
        ("{script-hash}", SCRIPT_HASH),
        ("{title}", &title),
        ("{style}", STYLE),
    ];
    for (mark, text) in parts
        .into_iter()
        .chain([("{data}", json.as_str()), ("{script}", SCRIPT)])
    {
        let (before, after) = rest
            .split_once(mark)
            .expect("the template has every mark, in this order");
        page.extend_from_slice(before.as_bytes());
        page.extend_from_slice(text.as_bytes());
        rest = after;
    }
    page.extend_from_slice(rest.as_bytes());
    page
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    /// The hash that a browser will calculate, by coreutils.
    fn hash(text: &str) -> String {
        let sum = "sha256sum | cut -d' ' -f1 | tr a-f A-F | basenc --base16 -d | base64 -w0";
        let mut child = Command::new("sh")
            .args(["-c", sum])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    }

    #[test]
    fn the_hashes_are_those_of_script_and_style() {
        assert_eq!(
            (STYLE_HASH, SCRIPT_HASH),
            (hash(STYLE).as_str(), hash(SCRIPT).as_str())
        );
    }

    #[test]
    fn of_equal_weights_an_even_selection_is_chosen() {
        let chosen = |weights: &[f64], most| -> Vec<usize> {
            let mut sorted = weights.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let mut chosen = Chosen::new(&sorted, most);
            (0..weights.len())
                .filter(|index| chosen.has(weights[*index]))
                .collect()
        };
        assert_eq!(chosen(&[1.0; 8], 4), [1, 3, 5, 7]);
        // The two heavier ones, and every other of the four equal ones.
        let mixed = [1.0, 5.0, 1.0, 1.0, 2.0, 0.0, 1.0];
        assert_eq!(chosen(&mixed, 4), [1, 2, 4, 6]);
        assert_eq!(chosen(&[1.0, 2.0], 4), [0, 1]);
        assert_eq!(chosen(&[0.0, 0.0], 2), [0, 1]);
        assert!(chosen(&[0.0, 0.0], 0).is_empty());
    }
}
