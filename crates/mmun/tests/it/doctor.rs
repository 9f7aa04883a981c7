//! `mmun doctor`: one answer for each source, for root and for others.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use serde_json::Value;
use testkit::{Cap, require};

use crate::support::{Public, parse, text, within};

const NOBODY: u32 = 65534;

fn doctor(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmun"));
    command.arg("doctor").args(args);
    within("mmun doctor", move || command.output().unwrap())
}

fn check(output: &Output) -> Vec<Value> {
    let rows = parse(text(&output.stdout));
    let names: Vec<&Value> = rows.iter().map(|row| &row["source"]).collect();
    assert_eq!(names, ["kernel", "hook", "uffd", "process"]);
    for row in &rows {
        let keys: Vec<&String> = row.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            ["v", "source", "usable", "missing", "remedy", "features"]
        );
        assert_eq!(row["v"], 1);
        assert_eq!(
            row["usable"].as_bool().unwrap(),
            row["missing"].is_null(),
            "{row}"
        );
        assert!(
            row["remedy"].is_null() || !row["missing"].is_null(),
            "{row}"
        );
        let features: Vec<&str> = row["features"]
            .as_array()
            .unwrap()
            .iter()
            .map(|word| word.as_str().unwrap())
            .collect();
        for word in ["linux=", "io_uring", "pagemap"] {
            assert!(
                features.iter().any(|feature| feature.contains(word)),
                "{word} in {row}"
            );
        }
    }
    let all = rows.iter().all(|row| row["usable"] == true);
    assert_eq!(
        output.status.code(),
        Some(i32::from(!all)),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(text(&output.stderr), "");
    rows
}

#[test]
fn each_source_has_an_answer_and_the_status_is_0_if_all_work() {
    let rows = check(&doctor(&["--json"]));
    if require(Cap::Ptrace) {
        assert_eq!(rows[3]["usable"], true);
    }
    if require(Cap::Kvm) && require(Cap::Bpf) && require(Cap::Root) {
        assert_eq!(rows[0]["usable"], true);
    }
}

#[test]
fn an_ordinary_user_learns_the_lacks_of_the_kernel_source_and_their_remedies() {
    if !require(Cap::Root) {
        return;
    }
    let copy = Public::new();
    let mut command = Command::new(copy.mmun());
    command
        .args(["doctor", "--json"])
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/");
    let rows = check(&within("mmun doctor", move || command.output().unwrap()));
    assert_eq!(rows[0]["usable"], false);
    // Both lacks at once; the remedy for the device depends on its owner.
    let missing = rows[0]["missing"].as_str().unwrap();
    assert!(missing.contains("CAP_BPF"), "{missing}");
    let remedy = rows[0]["remedy"].as_str().unwrap();
    // Capabilities on the program itself would be lent to every user.
    let broker = format!(
        "sudo -b '{}' broker --group \"$(id -gn)\"",
        copy.mmun().display()
    );
    let private = "sudo setcap cap_bpf,cap_perfmon+ep /usr/local/bin/mmun-kernel";
    let has_broker = std::fs::exists("/sys/kernel/btf/vmlinux").unwrap();
    if has_broker {
        assert_eq!(remedy, broker, "it needs neither of the rights");
    } else {
        assert!(remedy.ends_with(private), "{remedy}");
    }
    if let Ok(device) = std::fs::metadata("/dev/kvm")
        && device.mode() & 0o006 != 0o006
    {
        assert!(
            missing.contains(&format!("mode {:04o}", device.mode() & 0o777)),
            "{missing}"
        );
        let is_of_a_group = device.gid() != 0 && device.mode() & 0o060 == 0o060;
        assert!(
            has_broker || remedy.contains("usermod") == is_of_a_group,
            "{remedy}"
        );
    }
    let features = rows[0]["features"].to_string();
    assert!(
        !rows
            .iter()
            .any(|row| row["remedy"].to_string().contains("PROGRAM")),
        "{rows:?}"
    );
    assert!(
        features.contains("not-root") && features.contains("pagemap=without-frames"),
        "{features}"
    );
    if !require(Cap::Userfaultfd) {
        return;
    }
    let private = "sudo setcap cap_sys_ptrace+ep /usr/local/bin/mmun-uffd";
    assert!(
        rows[2]["remedy"].as_str().is_some_and(|remedy| remedy
            .starts_with("sudo install -m 0750 ")
            && remedy.ends_with(private)),
        "{}",
        rows[2]
    );
}

#[test]
fn text_and_json_agree() {
    let output = doctor(&[]);
    let (page, rows) = (text(&output.stdout), check(&doctor(&["--json"])));
    for row in rows {
        let verdict = if row["usable"] == true {
            "usable"
        } else {
            "not usable"
        };
        let begin = format!("{:9}{verdict}", row["source"].as_str().unwrap());
        assert!(
            page.lines().any(|line| line.starts_with(&begin)),
            "{begin}: {page}"
        );
        let info = mmu_source::SOURCES
            .iter()
            .find(|info| row["source"] == info.name)
            .expect("it is a source");
        assert!(
            page.contains(info.sees) && page.contains(info.misses),
            "{info:?}: {page}"
        );
        assert!(page.contains(&format!("needs: {}\n", info.needs)), "{page}");
        for remedy in row["remedy"]
            .as_str()
            .into_iter()
            .flat_map(|line| line.split(" && "))
        {
            assert!(
                page.contains(&format!("try: {remedy}\n")),
                "{remedy}: {page}"
            );
        }
        for missing in row["missing"]
            .as_str()
            .into_iter()
            .flat_map(|line| line.split("; "))
        {
            assert!(page.contains(missing), "{missing}: {page}");
        }
    }
    assert!(page.contains("linux=") && !page.contains('\x1b'), "{page}");
    // Independent of the length of the program's path.
    let page = page.replace(env!("CARGO_BIN_EXE_mmun"), "mmun");
    assert!(page.lines().all(|line| line.len() <= 160), "{page}");
}
