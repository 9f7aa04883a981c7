//! Which UCX, libfabric, Open MPI and MPICH are installed, and what the drop-in does for each.
//!
//! This module runs the libraries' own programs, as an administrator would, because loading a
//! library could start it.

use std::process::{Command, Stdio};

/// The libraries, each with the command that prints its version.
const ASKED: [(&str, &[&str]); 4] = [
    ("UCX", &["ucx_info", "-v"]),
    ("libfabric", &["fi_info", "--version"]),
    ("Open MPI", &["ompi_info", "--version"]),
    ("MPICH", &["mpichversion", "-v"]),
];

/// One line for each library: its version and what the drop-in does for it, or that its program is
/// not installed.
pub(super) fn lines() -> Vec<String> {
    ASKED
        .iter()
        .map(|(name, words)| match version(words) {
            None => format!("{name}: no {} in PATH", words[0]),
            Some(version) => format!("{name} {}: {}", dotted(&version), verdict(name, &version)),
        })
        .collect()
}

fn version(words: &[&str]) -> Option<Vec<u32>> {
    let mut command = Command::new(words[0]);
    let output = command
        .args(&words[1..])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    first_version(&String::from_utf8_lossy(&output.stdout))
}

/// The first version number in a text: numbers with dots between them.
fn first_version(text: &str) -> Option<Vec<u32>> {
    text.split(|c: char| c.is_whitespace() || c == ',')
        .find_map(|word| {
            let word = word.trim_start_matches('v');
            let word: String = word
                .chars()
                .take_while(|c| c.is_ascii_digit() || *c == '.')
                .collect();
            let numbers: Vec<u32> = word
                .split('.')
                .map_while(|number| number.parse().ok())
                .collect();
            (numbers.len() >= 2).then_some(numbers)
        })
}

fn dotted(version: &[u32]) -> String {
    version
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(".")
}

fn verdict(name: &str, version: &[u32]) -> &'static str {
    match name {
        "UCX" if version >= &[1, 23] => {
            "newer than the newest tested version (1.22); 'mmun coverage --library ucx' tests it"
        }
        "UCX" if version >= &[1, 12] => {
            "protected: receives each change, and each look-up is checked"
        }
        "UCX" => {
            "older than the oldest tested version (1.12): update UCX, or set UCX_MEM_EVENTS=n, which turns its cache off"
        }
        "libfabric" if version >= &[1, 13] => {
            "protected: each hit is checked, through an imported monitor"
        }
        "libfabric" => "not protected: a monitor can be imported from 1.13 on",
        "Open MPI" => {
            "protected through UCX (pml ucx) and libfabric (mtl or btl ofi); if Open MPI imports its own monitor first, that monitor stays"
        }
        _ => "protected through UCX (ch4:ucx) or libfabric (ch4:ofi)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_the_programs_print() {
        for (text, found) in [
            ("# Version 1.13.1\n# Git", Some(vec![1, 13, 1])),
            ("# Library version: 1.22.0", Some(vec![1, 22, 0])),
            ("fi_info: 1.17.0\nlibfabric: 1.17.0", Some(vec![1, 17, 0])),
            ("Open MPI v4.1.4\n", Some(vec![4, 1, 4])),
            ("MPICH Version:    \t4.0.2\n", Some(vec![4, 0, 2])),
            ("libfabric: 2.3.0rc1", Some(vec![2, 3, 0])),
            ("no numbers", None),
        ] {
            assert_eq!(first_version(text), found, "{text}");
        }
    }

    #[test]
    fn what_is_done_depends_on_the_version() {
        for version in [
            &[1, 12][..],
            &[1, 13, 1],
            &[1, 14],
            &[1, 16, 0],
            &[1, 22, 0],
        ] {
            assert!(verdict("UCX", version).contains("each look-up is checked"));
        }
        assert!(verdict("UCX", &[1, 23]).contains("newer than"));
        assert!(verdict("UCX", &[1, 10, 1]).contains("older than"));
        assert!(verdict("libfabric", &[1, 12, 1]).contains("not protected"));
        assert!(verdict("libfabric", &[2, 1]).contains("each hit is checked"));
    }
}
