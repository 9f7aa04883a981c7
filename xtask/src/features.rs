//! `cargo xtask features`: tests crates with no feature and with each feature alone. The other
//! steps of the gate build them with their default features or more.

use std::path::Path;
use std::process::{Command, ExitCode};

/// For each crate: its name, its features (the empty string stands for no feature), and the
/// dependencies that the crate must not have without features.
const CRATES: &[(&str, &[&str], &[&str])] = &[
    (
        "mmu-source",
        &["", "hook", "kernel", "process", "uffd"],
        &["iced-x86", "rustix"],
    ),
    (
        "regcache",
        &["", "hook", "kernel", "uring", "vfio"],
        &["iced-x86", "mmu-source"],
    ),
];

pub(crate) fn run(root: &Path) -> ExitCode {
    let cargo = |arguments: &[&str]| {
        let mut cargo = Command::new("cargo");
        cargo.args(arguments).current_dir(root);
        cargo
    };
    for (name, features, absent) in CRATES {
        let tree = [
            "tree",
            "--package",
            name,
            "--no-default-features",
            "--edges",
            "normal",
            "--prefix",
            "none",
        ];
        let tree = cargo(&tree).output().expect("cargo runs");
        if !tree.status.success() {
            let why = String::from_utf8_lossy(&tree.stderr);
            eprintln!("features: cargo tree of {name} fails: {}", why.trim());
            return ExitCode::FAILURE;
        }
        let tree = String::from_utf8_lossy(&tree.stdout).into_owned();
        let is_there = |other: &&&str| {
            tree.lines()
                .any(|line| line.split(' ').next() == Some(other))
        };
        if let Some(other) = absent.iter().find(is_there) {
            eprintln!("features: {name} without features depends on {other}");
            return ExitCode::FAILURE;
        }
        for feature in *features {
            println!(
                "== {name} with {}",
                if feature.is_empty() {
                    "no feature"
                } else {
                    feature
                }
            );
            let with = [
                "--package",
                name,
                "--no-default-features",
                "--features",
                feature,
            ];
            // The check for warnings excludes the tests, because with few features they leave some
            // of their helpers unused.
            let check = [
                &["clippy", "--quiet"],
                &with[..],
                &["--lib", "--", "-D", "warnings"],
            ]
            .concat();
            let test = [&["test", "--quiet"], &with[..]].concat();
            if ![check, test].iter().all(|arguments| {
                cargo(arguments)
                    .status()
                    .is_ok_and(|status| status.success())
            }) {
                eprintln!("features: {name} fails with {feature:?} alone");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
