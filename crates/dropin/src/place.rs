//! Where the report of this process goes, and how it begins.

use crate::settings::settings;
use std::sync::Once;

/// The first use of either library in this process.
pub(crate) fn begin() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // A process that ends without a word is to be told from one that never was.
        if let Some(folder) = folder() {
            let _ = std::fs::write(
                path_in(&folder),
                format!(
                    "{}  no report: it did not return from main or call exit\n",
                    head()
                ),
            );
        }
    });
}

/// Where `MMUN_REPORT` names a directory.
pub(crate) fn folder() -> Option<String> {
    settings().report.clone().filter(|name| name.ends_with('/'))
}

pub(crate) fn path_in(folder: &str) -> String {
    format!("{folder}{}", std::process::id())
}

/// The first line: which process.
pub(crate) fn head() -> String {
    let program = std::env::args_os().next().unwrap_or_default();
    let rank = [
        "OMPI_COMM_WORLD_RANK",
        "PMIX_RANK",
        "PMI_RANK",
        "SLURM_PROCID",
    ]
    .iter()
    .find_map(std::env::var_os);
    let rank = rank.map_or(String::new(), |rank| {
        format!(" rank {}", rank.to_string_lossy())
    });
    format!(
        "mmun: process {}{rank}: {}\n",
        std::process::id(),
        program.to_string_lossy()
    )
}
