//! A program that imports a libfabric monitor of its own.

use crate::support::{build, output, preloaded, text};

/// Runs the program; returns its output and the report.
fn import(order: &str) -> Option<(String, String)> {
    import_with(order, "hook", &[])
}

fn import_with(
    order: &str,
    source: &str,
    environment: &[(&str, &str)],
) -> Option<(String, String)> {
    let program = build("gcc", "importer.c", "libfabric", &["-lfabric"])?;
    let mut command = preloaded(program, source);
    command.arg(order).envs(environment.iter().copied());
    let output = output(command);
    let (out, report) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{order}: {out}{report}");
    Some((out, report))
}

#[test]
fn the_second_importer_gets_ebusy_and_continues() {
    if !testkit::require(testkit::Cap::Program("fi_info")) {
        return;
    }
    let Some((out, report)) = import("second") else {
        return;
    };
    assert_eq!(out, "busy\na domain\n", "{report}");
    assert!(report.contains("  libfabric protected"), "{report}");
    // Now the drop-in is the second importer; its report says so.
    let (out, report) = import("first").expect("it was built");
    assert_eq!(out, "imported\na domain\n", "{report}");
    assert!(
        report.contains("  libfabric not protected: another monitor was imported first (EBUSY)"),
        "{report}"
    );
    if !crate::cache::has_kernel() {
        return;
    }
    let program = build("gcc", "importer.c", "libfabric", &["-lfabric"]).expect("it was built");
    let mut command = preloaded(program, "both");
    command.arg("first").env("MMUN_STRICT", "1");
    let refused = output(command);
    let error = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(125), "{error}");
    assert!(
        error.starts_with("mmun: MMUN_STRICT=1 and another monitor was imported first (EBUSY)"),
        "{error}"
    );
}

#[test]
fn the_users_choice_of_a_monitor_is_not_made_weaker() {
    if !testkit::require(testkit::Cap::Program("fi_info")) {
        return;
    }
    const NAME: &str = "FI_MR_CACHE_MONITOR";
    let disabled = [(NAME, "disabled"), ("MMUN_STRICT", "0")];
    let Some((out, report)) = import_with("second", "hook", &disabled) else {
        return;
    };
    assert_eq!(
        out, "busy\na domain\n",
        "another importer would turn the cache on: {report}"
    );
    let line = "  libfabric caches nothing, because of FI_MR_CACHE_MONITOR=disabled\n";
    assert!(report.contains(line), "{report}");
    // Without the kernel source, this monitor sees more than the hook does.
    let userfaultfd = [(NAME, "userfaultfd")];
    let (out, report) = import_with("second", "hook", &userfaultfd).expect("it was built");
    assert_eq!(out, "imported\na domain\n", "{report}");
    let line = "  libfabric not protected: FI_MR_CACHE_MONITOR=userfaultfd stays in use";
    assert!(report.contains(line), "{report}");
    if crate::cache::has_kernel() {
        let (out, report) = import_with("second", "both", &userfaultfd).expect("it was built");
        assert_eq!(out, "busy\na domain\n", "{report}");
        assert!(report.contains("  libfabric protected"), "{report}");
    }
}
