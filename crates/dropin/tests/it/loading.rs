//! The library is loaded by `dlopen`, and a cache is used for the first time, while five threads
//! map, unmap and fork.

use crate::cache::{ALL, Cache, flags, runs};
use crate::support::{build, library, output, text};
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
