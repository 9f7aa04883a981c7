//! Finds the drop-in library.

use std::path::{Path, PathBuf};

const NAME: &str = "libmmun_dropin.so";

/// The library: the file of `MMUN_DROPIN`. Without that variable, the first file that exists beside
/// this program, in `../lib`, or in `../lib/mmun`.
///
/// # Errors
/// One line: the folders that were searched, or why the found file cannot be used.
pub(crate) fn library() -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os("MMUN_DROPIN").filter(|named| !named.is_empty()) {
        let named = PathBuf::from(named);
        return usable(&named).ok_or(format!("MMUN_DROPIN={}: no such file", named.display()))?;
    }
    let program = std::env::current_exe().map_err(|error| {
        format!(
            "/proc/self/exe: {}; without /proc, MMUN_DROPIN=FILE must name {NAME}",
            crate::reason(&error)
        )
    })?;
    let beside = program.parent().unwrap_or(Path::new("/"));
    let places = [
        beside.join(NAME),
        beside.join("../lib").join(NAME),
        beside.join("../lib/mmun").join(NAME),
    ];
    places
        .iter()
        .find_map(|place| usable(place))
        .unwrap_or_else(|| {
            Err(format!(
                "{NAME} is neither in {} nor in ../lib of it ('cargo build --release -p mmun-dropin' makes it); MMUN_DROPIN=FILE names it",
                beside.display()
            ))
        })
}

/// The absolute path of a file, or why `LD_PRELOAD` cannot contain that path; `None` if there is no
/// such file.
fn usable(place: &Path) -> Option<Result<PathBuf, String>> {
    let place = place.canonicalize().ok()?;
    let name = place.to_string_lossy();
    // These characters separate names in LD_PRELOAD, and cannot be quoted.
    if name.contains([' ', ':', '\t', '\n']) {
        return Some(Err(format!(
            "{name}: LD_PRELOAD cannot name a file with a space or a colon; move it"
        )));
    }
    Some(Ok(place))
}
