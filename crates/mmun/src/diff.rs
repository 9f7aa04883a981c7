//! `mmun diff`: what changed between two recorded runs, by place in the code.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write as _};
use std::path::Path;

use crate::args::DiffArgs;
use crate::digits::Put;
use crate::outcome::{self, Outcome};
use crate::output::is_standard;
use crate::recording::{Changed, Recording, input_name};
use crate::summary::{Row, Sort, printable, size, time, write_row};
use crate::{complain, json, written};

/// The exit status if the two runs could not be compared.
const FAILED: Outcome = Outcome::Exit(2);

pub(crate) fn main(args: &DiffArgs) -> Outcome {
    if [&args.before, &args.after].map(|path| is_standard(path)) == [true; 2] {
        complain("read on standard input: only one of the two traces can be there");
        return FAILED;
    }
    let [Some(before), Some(after)] = [&args.before, &args.after].map(|path| open(path)) else {
        return FAILED;
    };
    let has_own = |recording: &Recording| {
        recording
            .changes
            .iter()
            .any(|changed| changed.change.own.is_some())
    };
    let wall = args.wall || has_own(&before) != has_own(&after);
    if wall && !args.wall {
        complain(
            "only one of the two was recorded with --details: times are those on the clock, as with --wall",
        );
    }
    let rows = compare(&before, &after, wall, args.sort);
    let mut out = Vec::new();
    if args.json {
        write_json(&mut out, &rows, args.top);
    } else {
        // Writing to memory cannot fail.
        let _ = write_text(&mut out, &rows, args);
    }
    match written(io::stdout().write_all(&out)) {
        outcome::FAILED => FAILED,
        outcome => outcome,
    }
}

fn open(path: &Path) -> Option<Recording> {
    match Recording::open(path) {
        Ok(recording) => {
            if recording.is_cut {
                complain(&format!(
                    "{}: its last line is cut, and left out",
                    input_name(path)
                ));
            }
            Some(recording)
        }
        Err(error) => {
            complain(&format!("read on {}: {error}", input_name(path)));
            None
        }
    }
}

/// A place, before and after.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    name: String,
    before: Option<Row>,
    after: Option<Row>,
}

/// The error of the time of a call, in nanoseconds.
const ERROR: u64 = 500;

impl Pair {
    /// The change of the total by which rows are sorted. A change of time within the error of the
    /// measurement counts as 0.
    fn change(&self, sort: Sort) -> i128 {
        let key = |row: &Option<Row>| row.as_ref().map_or(0, |row| i128::from(sort.key(row)));
        let change = key(&self.after) - key(&self.before);
        if sort == Sort::Time && change.unsigned_abs() <= self.error() {
            0
        } else {
            change
        }
    }

    /// The error of the difference of the times: the errors of the calls of the run that has more
    /// calls, added up, because all may have the same sign.
    fn error(&self) -> u128 {
        let calls = |row: &Option<Row>| row.map_or(0, |row| row.calls);
        u128::from(calls(&self.before).max(calls(&self.after))) * u128::from(ERROR)
    }
}

/// All places, the largest changes first.
fn compare(before: &Recording, after: &Recording, wall: bool, sort: Sort) -> Vec<Pair> {
    let mut pairs: BTreeMap<Place, Pair> = BTreeMap::new();
    let both = [before, after]
        .iter()
        .all(|recording| !recording.stacks.is_empty());
    for (recording, is_after) in [(before, false), (after, true)] {
        let places = Places::new(recording, both);
        for changed in &recording.changes {
            let (place, name) = places.of(changed);
            let pair = pairs.entry(place).or_insert_with(|| Pair {
                name: String::new(),
                before: None,
                after: None,
            });
            if pair.name.is_empty() || is_after {
                pair.name = name;
            }
            let row = if is_after {
                &mut pair.after
            } else {
                &mut pair.before
            };
            row.get_or_insert_with(Row::default)
                .add(&changed.change, wall);
        }
    }
    let mut pairs: Vec<Pair> = pairs.into_values().collect();
    pairs.sort_by(|a, b| {
        let key = |pair: &Pair| {
            (
                pair.change(sort).unsigned_abs(),
                pair.change(Sort::Calls).unsigned_abs(),
            )
        };
        key(b).cmp(&key(a)).then_with(|| a.name.cmp(&b.name))
    });
    pairs
}

/// Identifies a place in both runs: the function, and its module, which is empty for the programs
/// themselves. The line number is ignored, because a line that is added above the place changes
/// the number.
type Place = (String, String);

struct Places<'a> {
    recording: &'a Recording,
    /// The names of the programs' files, which differ when two versions are compared.
    programs: BTreeSet<&'a str>,
    /// Whether both runs have stacks.
    by_stack: bool,
}

impl<'a> Places<'a> {
    fn new(recording: &'a Recording, by_stack: bool) -> Places<'a> {
        let programs = recording
            .spaces
            .values()
            .map(|space| recording.names.text(space.program));
        let programs = programs
            .filter_map(|path| path.rsplit('/').next())
            .collect();
        Places {
            recording,
            programs,
            by_stack,
        }
    }

    /// The place of a change, and its name for the output. Without stacks the place is the system
    /// call.
    fn of(&self, changed: &Changed) -> (Place, String) {
        let cause = changed.change.span.cause;
        if !self.by_stack {
            return ((cause.to_owned(), String::new()), cause.to_owned());
        }
        let stack = self.recording.stacks.get(changed.change.seen.site);
        let Some(frame) = stack.and_then(|stack| stack.frames.get(stack.place)) else {
            return ((String::new(), String::new()), "(not known)".to_owned());
        };
        if frame.is_loader() {
            let name = frame.loader_text();
            return ((name.clone(), String::new()), name);
        }
        let (function, module) = (frame.function.as_str(), frame.module.as_str());
        let is_program = self.programs.contains(module);
        // A function without a name is `module+0xoffset`. The program's own module is removed,
        // which leaves the offset.
        let bare = if is_program && !frame.has_name {
            function.trim_start_matches(module)
        } else {
            function
        };
        let place = (
            bare.to_owned(),
            if is_program {
                String::new()
            } else {
                module.to_owned()
            },
        );
        let name = if frame.has_name {
            format!("{function} ({module})")
        } else {
            function.to_owned()
        };
        (place, name)
    }
}

fn write_text(out: &mut Vec<u8>, pairs: &[Pair], args: &DiffArgs) -> io::Result<()> {
    let total = |of: fn(&Pair) -> Option<&Row>| {
        let mut sum = Row::default();
        pairs.iter().filter_map(of).for_each(|row| sum.merge(row));
        Some(sum)
    };
    let total = Pair {
        name: "total".to_owned(),
        before: total(|pair| pair.before.as_ref()),
        after: total(|pair| pair.after.as_ref()),
    };
    let titles = ["time", "calls", "resident", "range"];
    for (title, width) in titles.iter().zip(WIDTHS) {
        write!(out, "{title:>width$}{:>width$}", "change")?;
    }
    writeln!(out, "  where")?;
    let changed: Vec<&Pair> = pairs
        .iter()
        .filter(|pair| pair.before != pair.after)
        .collect();
    for pair in changed.iter().take(args.top).copied().chain([&total]) {
        line(out, pair)?;
    }
    if let Some(more @ 1..) = changed.len().checked_sub(args.top) {
        writeln!(out, "{more} more places changed")?;
    }
    let count = |is: fn(&Pair) -> bool| pairs.iter().filter(|pair| is(pair)).count();
    let (new, gone) = (
        count(|pair| pair.before.is_none()),
        count(|pair| pair.after.is_none()),
    );
    writeln!(out, "{} places: {new} new, {gone} gone.", pairs.len())
}

/// A column: the value of a row that the column shows, and the format of the value.
type Column = (fn(&Row) -> Option<u64>, fn(u64) -> String);

/// The widths of the columns and of their changes.
const WIDTHS: [usize; 4] = [10, 8, 11, 11];

/// Writes the line of a place: its totals in the second run, and their changes.
fn line(out: &mut Vec<u8>, pair: &Pair) -> io::Result<()> {
    let (before, after) = (
        pair.before.unwrap_or_default(),
        pair.after.unwrap_or_default(),
    );
    let columns: [Column; 4] = [
        (|row| Some(row.time), time),
        (|row| Some(row.calls), |calls| calls.to_string()),
        (|row| row.known_resident(), size),
        (|row| Some(row.bytes), size),
    ];
    for (at, ((value, show), width)) in columns.into_iter().zip(WIDTHS).enumerate() {
        let (Some(before), Some(after)) = (value(&before), value(&after)) else {
            write!(out, "{:>width$}{:>width$}", "?", "?")?;
            continue;
        };
        let is_noise = at == 0 && before != after && pair.change(Sort::Time) == 0;
        let change = match after.cmp(&before) {
            _ if is_noise => "~".to_owned(),
            std::cmp::Ordering::Less => format!("-{}", show(before - after)),
            std::cmp::Ordering::Equal => "=".to_owned(),
            std::cmp::Ordering::Greater => format!("+{}", show(after - before)),
        };
        write!(out, "{:>width$}{change:>width$}", show(after))?;
    }
    let mark = match (&pair.before, &pair.after) {
        (None, _) => "new: ",
        (_, None) => "gone: ",
        _ => "",
    };
    writeln!(out, "  {mark}{}", printable(&pair.name))
}

/// Writes one object for each place; a run without the place is `null`.
fn write_json(out: &mut Vec<u8>, pairs: &[Pair], top: usize) {
    for pair in pairs.iter().take(top) {
        out.put("{\"v\":1,\"kind\":\"diff\",\"where\":");
        json::put_str(out, &pair.name);
        for (key, row) in [(",\"before\":", &pair.before), (",\"after\":", &pair.after)] {
            out.put(key);
            match row {
                None => out.put("null"),
                Some(row) => {
                    out.put("{");
                    write_row(out, row);
                    out.put("}");
                }
            }
        }
        out.put("}\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run of `program`, in which each function unmaps the given number of pages, all of them in
    /// memory.
    fn run(program: &str, functions: &[(&str, u64, u64)]) -> Recording {
        let mut text = format!(
            "{{\"v\":1,\"t\":1,\"kind\":\"mm_new\",\"pid\":7,\"tid\":7,\"mm\":1,\"program\":\"/bin/{program}\"}}\n"
        );
        let mut t = 1;
        for (site, (_, pages, own)) in functions.iter().enumerate() {
            let (bytes, end) = (pages * 4096, 0x1000 + pages * 4096);
            let same = format!(
                "\"pid\":7,\"tid\":7,\"mm\":1,\"event\":\"unmap\",\"cause\":\"munmap\",\"start\":\"0x1000\",\
                 \"end\":\"{end:#x}\",\"blockable\":true,\"address\":4096,\"bytes\":{bytes}"
            );
            t += 2;
            text += &format!(
                "{{\"v\":1,\"t\":{t},\"kind\":\"start\",{same},\"what\":\"anonymous\",\"resident\":{bytes},\"file\":0,\
                 \"huge\":0,\"swapped\":0,\"site\":{site}}}\n"
            );
            text += &format!(
                "{{\"v\":1,\"t\":{},\"kind\":\"end\",{same},\"result\":0,\"self\":{own}}}\n",
                t + 1
            );
        }
        for (site, (function, ..)) in functions.iter().enumerate() {
            let named = !function.contains('+');
            text += &format!(
                "{{\"v\":1,\"t\":{},\"kind\":\"stack\",\"site\":{site},\"place\":0,\"frames\":[{{\"function\":\"{function}\",\
                 \"module\":\"{program}\",\"line\":\"a.c:{}\",\"named\":{named}}}]}}\n",
                t + 1,
                t * pages_of(program)
            );
        }
        Recording::read(text.as_bytes()).expect("it is a trace")
    }

    /// A factor that gives the two programs different line numbers, like those of two versions.
    fn pages_of(program: &str) -> u64 {
        program.len() as u64
    }

    #[test]
    fn places_are_the_same_in_another_version_of_the_program() {
        let before = run(
            "old",
            &[
                ("same", 2, 10_000),
                ("worse", 1, 10_000),
                ("left", 9, 5_000),
                ("noisy", 1, 1_000),
                ("old+0x10", 1, 1_000),
            ],
        );
        let after = run(
            "newer",
            &[
                ("worse", 4, 900_000),
                ("worse", 4, 100_000),
                ("same", 2, 10_000),
                ("newer+0x10", 1, 1_000),
                ("noisy", 1, 1_400),
                ("fresh", 1, 7_000),
            ],
        );
        let pairs = compare(&before, &after, false, Sort::Time);
        let found: Vec<(&str, i128, i128)> = pairs
            .iter()
            .map(|pair| {
                (
                    pair.name.as_str(),
                    pair.change(Sort::Time),
                    pair.change(Sort::Resident) / 4096,
                )
            })
            .collect();
        let expected = [
            ("worse (newer)", 990_000, 7),
            ("fresh (newer)", 7_000, 1),
            ("left (old)", -5_000, -9),
            ("newer+0x10", 0, 0),
            ("noisy (newer)", 0, 0),
            ("same (newer)", 0, 0),
        ];
        assert_eq!(found, expected);
        assert_eq!(
            compare(&before, &after, false, Sort::Resident)[0].name,
            "left (old)"
        );
        let mut out = Vec::new();
        line(&mut out, &pairs[4]).unwrap();
        let columns = String::from_utf8(out).unwrap();
        let columns: Vec<&str> = columns.split_whitespace().take(3).collect();
        assert_eq!(columns, ["1.4", "us", "~"], "less than the error");
        let gone = &pairs[2];
        assert!(gone.after.is_none() && gone.before.is_some_and(|row| row.calls == 1));
    }
}
