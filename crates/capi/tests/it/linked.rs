//! Programs that are linked statically with the library.

use crate::support::{root, scratch};
use std::path::Path;
use std::process::Command;
use std::{env, fs};
use testkit::{Cap, require, within};

/// The hook starts and sees a change, or the error names the reason. The hook must not read memory
/// that is not mapped.
const PROGRAM: &str = r#"
#include <errno.h>
#include <mmun/mmun.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
int main(void) {
	struct mmun_options options = { sizeof options, MMUN_SOURCE_HOOK, 0 };
	struct mmun *mmun;
	struct mmun_watch *watch;
	int error = mmun_open(&options, &mmun);
	if (error) {
		printf("no hook: %s\n", mmun_last_error());
		return error == -EOPNOTSUPP && *mmun_last_error() ? 0 : 1;
	}
	char *memory = mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || mmun_watch(mmun, memory, 4096, &watch)) return 2;
	if (!mmun_watch_valid(watch)) return 3;
	munmap(memory, 4096);
	if (mmun_watch_valid(watch)) return 4;
	mmun_unwatch(watch);
	mmun_close(mmun);
	printf("seen\n");
	return 0;
}
"#;

#[test]
fn the_hook_in_a_static_program_works_or_says_why_not() {
    if !require(Cap::Program("gcc")) {
        return;
    }
    let folder = scratch("linked");
    let (source, empty) = (folder.join("linked.c"), folder.join("empty.c"));
    fs::write(&source, PROGRAM).expect("written");
    fs::write(&empty, "int main(void) { return 0; }\n").expect("written");
    let test = env::current_exe().expect("this program has a path");
    let archive = test.with_file_name("libmmun.a");
    assert!(archive.exists(), "{}", archive.display());
    let link = |flag: &str, source: &Path, archive: Option<&Path>| {
        let program = folder.join(format!("program{flag}"));
        let mut gcc = Command::new("gcc");
        gcc.args([flag, "-w", "-I"]).arg(root().join("include"));
        gcc.arg("-o").arg(&program).arg(source).args(archive);
        let output = gcc.args(["-lpthread", "-lm", "-ldl"]).output();
        let output = output.expect("the compiler runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            Ok(program)
        } else {
            Err(error)
        }
    };
    for flag in ["-static", "-static-pie"] {
        if let Err(why) = link(flag, &empty, None) {
            println!("SKIP linked::the_hook_in_a_static_program: gcc cannot do {flag}: {why}");
            continue;
        }
        let program = link(flag, &source, Some(&archive)).expect("it links");
        let run = program.clone();
        let output = within("the program", move || {
            Command::new(run).output().expect("it runs")
        });
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{flag}: {} {said}", output.status);
        assert!(
            said.starts_with("seen") || said.starts_with("no hook: "),
            "{said}"
        );
        fs::remove_file(program).expect("removed");
    }
}
