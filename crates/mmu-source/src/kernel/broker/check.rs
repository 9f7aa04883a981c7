//! The client's check of the descriptors that it receives.
//!
//! The check reads `/proc`, where the kernel itself states to which object a descriptor refers.
//! Without the check, a hostile broker could send a file in place of a map and truncate the file,
//! which would kill the client with `SIGBUS`. The broker could also send a device other than KVM,
//! for which `KVM_CREATE_VM` means something else.

use super::super::layout::{RING, header};
use super::super::programs::SharedMaps;
use super::super::{filter, sys};
use crate::fields::field;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

const ARRAY: u64 = 2;
const RING_BUFFER: u64 = 27;

/// Returns the number in a line `name: number` of a descriptor's `fdinfo`.
fn number(description: &str, name: &str) -> Option<u64> {
    field(description, name)?.parse().ok()
}

/// Returns the type and the `fdinfo` of an anonymous-inode descriptor, or `None` for any other
/// descriptor.
fn description(descriptor: &OwnedFd) -> io::Result<Option<(String, String)>> {
    let number = descriptor.as_raw_fd();
    let name = fs::read_link(format!("/proc/thread-self/fd/{number}"))?;
    // The link of a descriptor of a file is a path, which begins with a slash.
    let Some(kind) = name
        .to_str()
        .and_then(|name| name.strip_prefix("anon_inode:"))
    else {
        return Ok(None);
    };
    Ok(Some((
        kind.to_owned(),
        fs::read_to_string(format!("/proc/thread-self/fdinfo/{number}"))?,
    )))
}

/// Tells whether the descriptors are maps of the kinds and sizes that a broker sends.
pub(super) fn are_maps(maps: &SharedMaps) -> io::Result<bool> {
    let is_map = |map: &OwnedFd, wanted: [(&str, u64); 3]| {
        let Some((kind, text)) = description(map)? else {
            return Ok::<_, io::Error>(false);
        };
        Ok(kind == "bpf-map"
            && wanted
                .iter()
                .all(|(name, value)| number(&text, name) == Some(*value)))
    };
    let value = |bytes: usize| {
        [
            ("map_type", ARRAY),
            ("value_size", bytes as u64),
            ("max_entries", 1),
        ]
    };
    let ring = [
        ("map_type", RING_BUFFER),
        ("value_size", 0),
        ("max_entries", RING as u64),
    ];
    Ok(is_map(&maps.header, value(header::BYTES))?
        && is_map(&maps.sum, value(filter::PART))?
        && is_map(&maps.own, value(filter::PART))?
        && is_map(&maps.ring, ring)?)
}

/// Tells whether the descriptor is a link that attaches a program to the tracepoint.
pub(super) fn is_link(link: &OwnedFd) -> io::Result<bool> {
    let tracepoint = sys::TRACEPOINT.to_str().expect("it is ASCII");
    let names_it = |line: &str| line.split_whitespace().nth(1) == Some(tracepoint);
    Ok(description(link)?
        .is_some_and(|(kind, text)| kind.starts_with("bpf") && text.lines().any(names_it)))
}

/// Tells whether the descriptor is the KVM device.
pub(super) fn is_kvm(kvm: &OwnedFd) -> io::Result<bool> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    const MISC: u32 = 10;
    const KVM: u32 = 232;
    let file = fs::File::from(kvm.try_clone()?).metadata()?;
    Ok(file.file_type().is_char_device() && file.rdev() == libc::makedev(MISC, KVM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_only_named_like_a_map_is_refused() {
        let text = "pos:\t0\nmap_type:\t2\nvalue_size:\t4096\nmax_entries:\t1\nmap_type_more:\t9\n";
        assert_eq!(number(text, "map_type"), Some(2));
        assert_eq!(number(text, "map"), None);
        let file = OwnedFd::from(fs::File::open("/dev/null").expect("it is there"));
        assert!(!is_kvm(&file).expect("proc"));
        assert!(!is_link(&file).expect("proc"));
        let [header, sum, own, ring] = [(); 4].map(|()| file.try_clone().expect("a descriptor"));
        assert!(
            !are_maps(&SharedMaps {
                header,
                sum,
                own,
                ring
            })
            .expect("proc")
        );
    }
}
