//! What happens when the library and the caches are loaded.

use crate::cache::{ALL, Cache, flags, program, runs};
use crate::support::{build, library, output, text};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

#[test]
fn it_can_be_loaded_while_five_threads_map_unmap_and_fork() {
    for cache in ALL {
        let Some(mut flags) = flags(cache) else {
            continue;
        };
        // The loader binds UCX's calls in the order of loading, so UCX must come after the drop-in.
        // libfabric's archive cannot become a part of a shared library, and its cache finds the
        // drop-in by name.
        let (program, cache_file) = match cache {
            Cache::Ucx => {
                flags.extend(["-shared", "-fPIC"]);
                let plugin = build("gcc", "cache.c", "plugin", &flags);
                (build("gcc", "loading.c", "ucx", &["-ldl"]), plugin)
            }
            Cache::Libfabric => {
                flags.push("-DWITHIN");
                let program = build("gcc", "loading.c", "libfabric", &flags);
                (program, Some(Path::new("-").to_owned()))
            }
        };
        let (Some(program), Some(cache_file)) = (program, cache_file) else {
            continue;
        };
        for source in ["hook", "auto"] {
            for _ in 0..runs(1) {
                let mut command = Command::new(&program);
                command.arg(library()).arg(&cache_file);
                command.args(["threads", "0.05"]).env("MMUN", source);
                let output = output(command);
                let (out, error) = (text(&output.stdout), text(&output.stderr));
                assert!(output.status.success(), "{cache:?} {source}: {output:?}");
                assert!(
                    out.ends_with(" rounds\n"),
                    "{cache:?} {source}: {out}{error}"
                );
            }
        }
    }
}

/// An ordinary user, for whom the `kernel` source does not work.
const NOBODY: u32 = 65534;

#[test]
fn ucx_patches_libc_only_where_the_hook_does_not_run() {
    let Some(program) = program(Cache::Ucx) else {
        return;
    };
    let patches = |source: Option<&str>, user: Option<u32>| {
        let mut command = Command::new(&program);
        command
            .args(["again", "1"])
            .env("UCX_MEM_LOG_LEVEL", "debug");
        if let Some(source) = source {
            command.env("LD_PRELOAD", library()).env("MMUN", source);
        }
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let output = output(command);
        let (out, error) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{source:?}: {out}{error}");
        (out + &error)
            .matches(" installing bistro hook for munmap ")
            .count()
    };
    assert_eq!(patches(None, None), 1, "the control");
    assert_eq!(patches(Some("off"), None), 1);
    assert_eq!(patches(Some("kernel"), None), 1);
    assert_eq!(patches(Some("both"), Some(NOBODY)), 1);
    for source in ["hook", "auto"] {
        assert_eq!(patches(Some(source), None), 0, "{source}");
        assert_eq!(patches(Some(source), Some(NOBODY)), 0, "{source}");
    }
}
