//! Which UCX, libfabric, Open MPI and MPICH are installed, and what the drop-in does for each.
//!
//! This module runs the libraries' own programs, as an administrator would, because loading a
//! library could start it.

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output, Stdio};

/// The libraries, each with the command that prints its version, and the file that programs load.
const ASKED: [(&str, &[&str], &str); 4] = [
    ("UCX", &["ucx_info", "-v"], "libucp.so.0"),
    ("libfabric", &["fi_info", "--version"], "libfabric.so.1"),
    ("Open MPI", &["ompi_info", "--version"], "libmpi.so.40"),
    ("MPICH", &["mpichversion", "-v"], "libmpi.so.12"),
];

/// One line for each library: its version and what the drop-in does for it, or why its version is
/// not known. A second line if the environment names another copy of the library.
pub(super) fn lines() -> Vec<String> {
    let folders = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let mut lines = Vec::new();
    for (name, words, file) in ASKED {
        lines.push(match version(words) {
            Err(reason) => format!("{name}: {reason}"),
            Ok(version) => format!("{name} {}: {}", dotted(&version), verdict(name, &version)),
        });
        lines.extend(other_copy(name, words[0], file, &folders));
    }
    lines
}

/// The line about a copy in `LD_LIBRARY_PATH`, which programs load. `program`, whose version the
/// other line has, may belong to another copy.
fn other_copy(name: &str, program: &str, file: &str, folders: &OsStr) -> Option<String> {
    let mut files = std::env::split_paths(folders).map(|folder| folder.join(file));
    let found = files.find(|path| path.is_file())?;
    Some(format!(
        "{name}: programs load {} (LD_LIBRARY_PATH); the version above is that of {program} in PATH, and may be another one",
        found.display()
    ))
}

/// Runs a command and returns the version that it prints, or the reason why there is none.
fn version(words: &[&str]) -> Result<Vec<u32>, String> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let output = output.map_err(|_| format!("no {} in PATH", words[0]))?;
    first_version(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| unknown(words[0], &output))
}

fn unknown(program: &str, output: &Output) -> String {
    match output.status.signal() {
        Some(signal) => format!(
            "{program} was killed by signal {signal}: it loads another version than its own, perhaps by LD_LIBRARY_PATH"
        ),
        None => format!("{program} prints no version ({})", output.status),
    }
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
    fn a_program_without_a_version_says_why() {
        let of = |words: &[&str]| version(words).expect_err("no version");
        assert_eq!(
            of(&["mmun-no-such-program"]),
            "no mmun-no-such-program in PATH"
        );
        assert_eq!(of(&["false"]), "false prints no version (exit status: 1)");
        let killed = of(&["sh", "-c", "kill -SEGV $$"]);
        assert!(
            killed.starts_with("sh was killed by signal 11: "),
            "{killed}"
        );
    }

    #[test]
    fn a_copy_of_the_environment_is_named() {
        let folder = std::env::current_exe().expect("a program has a file");
        let (folder, file) = (folder.parent().expect("a folder"), folder.file_name());
        let file = file.and_then(OsStr::to_str).expect("a plain name");
        let paths = std::env::join_paths(["/".as_ref(), folder]).expect("no colon");
        let line = other_copy("UCX", "ucx_info", file, &paths).expect("it is there");
        assert!(
            line.contains(&format!("{}/{file}", folder.display())),
            "{line}"
        );
        assert_eq!(other_copy("UCX", "ucx_info", file, OsStr::new("")), None);
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
