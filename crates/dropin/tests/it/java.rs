//! A Java program whose native part has a registration cache, in a library that the JVM loads with
//! `RTLD_LOCAL`.

use crate::cache::{Cache, has_kernel, program};
use crate::support::{build, library, output, text};
use std::path::Path;
use std::process::Command;
use testkit::{Cap, require};

/// Returns how many operations left a stale registration.
fn stale(classes: &Path, native: &Path, source: Option<&str>) -> u32 {
    let mut command = Command::new("java");
    command
        .args(["-Xmx64m", "-cp"])
        .args([classes, Path::new("Cache"), native]);
    if let Some(source) = source {
        command.env("LD_PRELOAD", library()).env("MMUN", source);
    }
    let output = output(command);
    let out = text(&output.stdout);
    let number = out
        .split_once(" stale of all")
        .and_then(|(n, _)| n.parse().ok());
    number.unwrap_or_else(|| panic!("{source:?}: {out}{}", text(&output.stderr)))
}

#[test]
fn a_java_program_is_served() {
    // `program` checks that the installed UCX has the layout that the native part declares.
    if !require(Cap::Program("javac")) || program(Cache::Ucx).is_none() {
        return;
    }
    let flags = ["-shared", "-fPIC", "-DWITH_UCX", "-lucp", "-lucs", "-lucm"];
    let native = build("gcc", "cache_jni.c", "jni", &flags).expect("gcc was there");
    let classes =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("java-{}", std::process::id()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/programs/Cache.java");
    let compiled = Command::new("javac")
        .arg("-d")
        .args([&classes, &source])
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", text(&compiled.stderr));
    let shipped = stale(&classes, &native, None);
    assert!(shipped >= 6, "the control: {shipped}");
    let hook = stale(&classes, &native, Some("hook"));
    assert!(hook < shipped, "{hook} with hook, {shipped} without");
    if has_kernel() {
        assert_eq!(stale(&classes, &native, Some("both")), 0);
    }
}
