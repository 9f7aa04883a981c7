//! A processor with BTI checks that an indirect branch lands on a landing pad. Patched pages must
//! keep that check.

use crate::child::alone;
use crate::pages::page_size;
use mmu_source::hook::{Hook, probe};
use std::fs;

/// Tells whether the processor checks the page at `address`: its mapping has the flag `bt`.
fn is_checked(address: u64) -> bool {
    let all = fs::read_to_string("/proc/self/smaps").expect("/proc is there");
    let mut is_here = false;
    for line in all.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if is_here {
                return flags.split_whitespace().any(|flag| flag == "bt");
            }
        } else if let Some((start, end)) = line
            .split(' ')
            .next()
            .and_then(|first| first.split_once('-'))
        {
            let number = |text| u64::from_str_radix(text, 16).ok();
            is_here = number(start)
                .zip(number(end))
                .is_some_and(|(start, end)| (start..end).contains(&address));
        }
    }
    panic!("{address:x} is not mapped");
}

/// A library that patches a function, as UCX does, makes its page writable and then executable
/// again, without the check. Its jump is no landing pad.
#[test]
fn a_page_that_another_library_has_changed_stays_without_them() {
    const NAME: &str = "landing_pads::a_page_that_another_library_has_changed_stays_without_them";
    alone(NAME, || {
        let sites = || probe().expect("there are sites");
        let of = |name: &str| {
            sites()
                .iter()
                .find(|site| site.name == name)
                .map(|site| site.address)
        };
        let changed = of("mmap").expect("it is hooked");
        let page = (changed as usize) & !(page_size() - 1);
        let code = std::ptr::with_exposed_provenance_mut(page);
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        // SAFETY: the page is code of libc, and stays readable and executable.
        assert_eq!(0, unsafe { libc::mprotect(code, page_size(), protection) });
        let flags = || -> Vec<bool> {
            sites()
                .iter()
                .map(|site| is_checked(site.address))
                .collect()
        };
        let before = flags();
        assert!(!is_checked(changed));
        let hook = Hook::install().expect("it can be patched");
        assert_eq!(flags(), before);
        drop(hook);
        assert_eq!(flags(), before);
    });
}

#[test]
fn patched_pages_keep_them() {
    alone("landing_pads::patched_pages_keep_them", || {
        let flags = || -> Vec<bool> {
            let sites = probe().expect("there are sites");
            sites.iter().map(|site| is_checked(site.address)).collect()
        };
        let before = flags();
        let has_extension = std::arch::is_aarch64_feature_detected!("bti");
        if !has_extension {
            println!("SKIP: this processor has no landing pads");
        }
        assert_eq!(
            before.contains(&true),
            has_extension,
            "as Debian builds glibc"
        );
        let hook = Hook::install().expect("it can be patched");
        assert_eq!(flags(), before);
        drop(hook);
        assert_eq!(flags(), before);
    });
}
