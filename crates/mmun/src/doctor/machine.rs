//! The machine and its kernel: features that belong to no single source.

use std::fs;

/// Words such as `linux=6.18.1`, `io_uring`, `pagemap=frames`.
pub(super) fn features() -> Vec<String> {
    let name = rustix::system::uname();
    let mut features = vec![
        format!("linux={}", name.release().to_string_lossy()),
        name.machine().to_string_lossy().into_owned(),
        (if rustix::process::geteuid().is_root() {
            "root"
        } else {
            "not-root"
        })
        .to_owned(),
    ];
    let uring = match io_uring::IoUring::new(1) {
        Ok(_) => "io_uring".to_owned(),
        Err(error) => format!("no-io_uring ({})", crate::reason(&error)),
    };
    features.push(uring);
    features.push(pagemap());
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    features.push(
        (if swaps.lines().count() > 1 {
            "swap"
        } else {
            "no-swap"
        })
        .to_owned(),
    );
    let merging = fs::read_to_string("/sys/kernel/mm/ksm/run").unwrap_or_default();
    features.push(
        (if merging.trim() == "1" {
            "ksm"
        } else {
            "ksm-off"
        })
        .to_owned(),
    );
    features
}

/// Says whether this user may read page frame numbers.
fn pagemap() -> String {
    use std::os::unix::fs::FileExt;
    // The page of a local variable is present.
    let local = 0_u8;
    let index = (&raw const local).addr() as u64 / rustix::param::page_size() as u64;
    let mut entry = [0; 8];
    let read = fs::File::open("/proc/self/pagemap")
        .and_then(|file| file.read_exact_at(&mut entry, index * 8));
    match read {
        Err(error) => format!("no-pagemap ({})", crate::reason(&error)),
        Ok(()) if u64::from_ne_bytes(entry) & ((1 << 55) - 1) == 0 => {
            "pagemap=without-frames".to_owned()
        }
        Ok(()) => "pagemap=frames".to_owned(),
    }
}
