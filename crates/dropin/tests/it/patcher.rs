//! Open MPI's own patcher of libc, loaded before and after the library.

use crate::cache::{Cache, has_kernel, program, run, stale};
use std::collections::BTreeSet;
use testkit::{Cap, require};

/// The operations that reached Open MPI's own hook.
fn told(out: &str) -> BTreeSet<&str> {
    out.lines()
        .filter_map(|line| line.strip_suffix(" told"))
        .filter_map(|line| line.get(..32))
        .collect()
}

/// The program, if the installed Open MPI has a patcher.
fn with_patcher(cache: Cache) -> Option<std::path::PathBuf> {
    let library = Cap::Library("libopen-pal.so.40");
    require(library).then(|| program(cache)).flatten()
}

#[test]
fn ucx_and_open_mpi_are_told_in_either_order() {
    let Some(program) = with_patcher(Cache::Ucx) else {
        return;
    };
    // As shipped, Open MPI's patch overwrites UCX's patch. In the other order UCX makes no cache.
    let shipped = run(&program, &["patcher", "last"], None);
    let alone = stale(&run(&program, &["stale"], Some("hook")));
    assert!(stale(&shipped) > alone, "the control: {shipped}");
    assert!(
        told(&shipped).len() >= 6,
        "Open MPI's hook works: {shipped}"
    );
    for order in ["first", "last"] {
        let out = run(&program, &["patcher", order], Some("hook"));
        assert_eq!(stale(&out), alone, "{order}: {out}");
        assert!(told(&out).is_superset(&told(&shipped)), "{order}: {out}");
        if order == "last" && has_kernel() {
            let out = run(&program, &["patcher", order], Some("both"));
            assert_eq!(stale(&out), 0, "{order}: {out}");
            assert!(told(&out).is_superset(&told(&shipped)), "{order}: {out}");
        }
    }
}

#[test]
fn libfabric_is_told_where_open_mpi_patches_afterwards() {
    let Some(program) = with_patcher(Cache::Libfabric) else {
        return;
    };
    // Each operation runs in a process that lists libfabric's providers, which takes a while. So
    // the program tries only every second operation.
    let words = ["patcher", "last", "2"];
    let out = run(&program, &words, Some("hook"));
    assert!(stale(&out) <= 2 && told(&out).len() >= 5, "{out}");
    if has_kernel() {
        let out = run(&program, &words, Some("both"));
        assert!(stale(&out) == 0 && told(&out).len() >= 5, "{out}");
    }
}
