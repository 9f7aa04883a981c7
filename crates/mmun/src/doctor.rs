//! `mmun doctor`: which sources work here, and what the others lack.

mod libraries;
mod machine;
mod probe;
mod remedy;

use std::io::{self, Write};

use crate::args::DoctorArgs;
use crate::complain;
use crate::outcome::Outcome;
use crate::source::Source;
use crate::style::{Mark, Style};

/// A source cannot be used.
const FOUND: Outcome = Outcome::Exit(1);
const FAILED: Outcome = Outcome::Exit(2);

/// The result of probing a source.
#[derive(Debug)]
struct Diagnosis {
    source: Source,
    /// Everything that is missing, each with a command that grants it, if there is one. Empty if
    /// the source can be used.
    lacks: Vec<Lack>,
    /// The features that were found, as words like `name=value`.
    features: Vec<String>,
}

/// Why a source cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lack {
    pub(crate) missing: String,
    /// Commands, joined by `&&`.
    pub(crate) remedy: Option<String>,
    /// Alternative commands.
    pub(crate) instead: Option<String>,
    /// What these commands grant, and to whom.
    pub(crate) note: Option<&'static str>,
}

impl Lack {
    /// Formats the lack as one line.
    pub(crate) fn to_line(&self) -> String {
        match &self.remedy {
            Some(remedy) => format!("{}; try: {remedy}", self.missing),
            None => self.missing.clone(),
        }
    }
}

pub(crate) fn main(args: DoctorArgs) -> Outcome {
    let machine = machine::features();
    let diagnoses = Source::ALL.map(|source| {
        let (lacks, mut features) = probe::probe(source);
        if args.json {
            // Each line of JSON must be complete in itself.
            features.extend(machine.iter().cloned());
        }
        Diagnosis {
            source,
            lacks,
            features,
        }
    });
    let text = if args.json {
        as_json(&diagnoses)
    } else {
        as_text(
            &diagnoses,
            &machine,
            &libraries::lines(),
            Style::of_stdout(),
        )
    };
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&format!(
                "write on standard output: {}",
                crate::reason(&error)
            ));
            FAILED
        }
        _ if diagnoses.iter().all(|diagnosis| diagnosis.lacks.is_empty()) => Outcome::Exit(0),
        _ => FOUND,
    }
}

/// Whether a source can be used.
///
/// # Errors
/// The first lack of the source.
pub(crate) fn usable(source: Source) -> Result<(), Lack> {
    probe::probe(source)
        .0
        .into_iter()
        .next()
        .map_or(Ok(()), Err)
}

fn as_text(
    diagnoses: &[Diagnosis],
    machine: &[String],
    libraries: &[String],
    style: Style,
) -> String {
    let mut text = String::new();
    for Diagnosis {
        source,
        lacks,
        features,
    } in diagnoses
    {
        let name = style.paint(Mark::Bold, format!("{:9}", source.name()));
        if lacks.is_empty() {
            text.push_str(&format!("{name}{}\n", style.paint(Mark::Good, "usable")));
        } else {
            text.push_str(&format!("{name}{}\n", style.paint(Mark::Bad, "not usable")));
            for lack in lacks {
                text.push_str(&format!("         lacks: {}\n", lack.missing));
                for (label, commands) in [("try", &lack.remedy), ("or", &lack.instead)] {
                    for command in commands.iter().flat_map(|line| line.split(" && ")) {
                        text.push_str(&format!("           {label}: {command}\n"));
                    }
                }
                if let Some(note) = lack.note {
                    text.push_str(&format!("           note: {note}\n"));
                }
            }
        }
        text.push_str(&format!("         needs: {}\n", source.info().needs));
        text.push_str(&format!("         sees: {}\n", source.info().sees));
        text.push_str(&format!("         misses: {}\n", source.info().misses));
        if !features.is_empty() {
            text.push_str(&wrapped("found:", features));
        }
    }
    text.push_str(&style.paint(Mark::Bold, "machine"));
    text.push('\n');
    text.push_str(&wrapped("found:", machine));
    text.push_str(&style.paint(Mark::Bold, "drop-in"));
    text.push('\n');
    libraries
        .iter()
        .for_each(|line| text.push_str(&format!("         {line}\n")));
    text
}

/// Words in lines that fit a terminal.
fn wrapped(label: &str, words: &[String]) -> String {
    const WIDTH: usize = 100;
    let mut lines = vec![format!("         {label}")];
    for (index, word) in words.iter().enumerate() {
        let comma = if index + 1 < words.len() { "," } else { "" };
        let last = lines.last_mut().expect("one line to begin with");
        if last.len() + 1 + word.len() + comma.len() > WIDTH {
            lines.push(format!("           {word}{comma}"));
        } else {
            last.push_str(&format!(" {word}{comma}"));
        }
    }
    lines.join("\n") + "\n"
}

fn as_json(diagnoses: &[Diagnosis]) -> String {
    let object = |Diagnosis {
                      source,
                      lacks,
                      features,
                  }: &Diagnosis| {
        let missing = quoted_or_null(lacks.iter().map(|lack| lack.missing.as_str()), "; ");
        // One command line for the user.
        let mut remedies: Vec<&str> = lacks
            .iter()
            .filter_map(|lack| lack.remedy.as_deref())
            .collect();
        remedies.dedup();
        let remedy = quoted_or_null(remedies.into_iter(), " && ");
        let features: Vec<String> = features.iter().map(|feature| quoted(feature)).collect();
        format!(
            "{{\"v\":1,\"source\":{},\"usable\":{},\"missing\":{missing},\"remedy\":{remedy},\"features\":[{}]}}\n",
            quoted(source.name()),
            lacks.is_empty(),
            features.join(",")
        )
    };
    diagnoses.iter().map(object).collect()
}

fn quoted_or_null<'a>(texts: impl Iterator<Item = &'a str>, between: &str) -> String {
    let texts: Vec<&str> = texts.collect();
    if texts.is_empty() {
        "null".to_owned()
    } else {
        quoted(&texts.join(between))
    }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            ' '.. => quoted.push(character),
            _ => quoted.push_str(&format!("\\u{:04x}", u32::from(character))),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_string_is_escaped() {
        assert_eq!(quoted("a \"b\" \\ \n ä"), r#""a \"b\" \\ \u000a ä""#);
        assert_eq!(quoted_or_null([].into_iter(), "; "), "null");
        assert_eq!(quoted_or_null(["a", "b"].into_iter(), "; "), "\"a; b\"");
    }

    #[test]
    fn features_are_wrapped_and_none_is_lost() {
        let words: Vec<String> = (0..60).map(|number| format!("feature{number}")).collect();
        let text = wrapped("found:", &words);
        assert!(text.lines().all(|line| line.len() <= 100));
        assert_eq!(text.matches("feature").count(), 60);
    }
}
