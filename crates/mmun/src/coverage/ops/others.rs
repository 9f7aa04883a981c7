//! Changes that the kernel makes by itself, or that need two NUMA nodes.

use std::fs;
use std::io;

use super::{CALL, NONE, until_changed};
use crate::coverage::operation::{Operation, Prepared};
use crate::coverage::page::{Judge, Page};
use crate::coverage::region::Region;

pub(super) const OPERATIONS: &[Operation] = &[
    Operation {
        name: "KSM merge",
        judge: Judge::Frame,
        claimed: NONE,
        prepare: || {
            if fs::read_to_string("/sys/kernel/mm/ksm/run")
                .unwrap_or_default()
                .trim()
                != "1"
            {
                return Err("merging is off; 'echo 1 > /sys/kernel/mm/ksm/run' turns it on".into());
            }
            let region = Region::anonymous(64)?;
            // All pages have the same content. When the kernel compares the first two pages, it
            // keeps the second one's frame for all.
            let watched = 32;
            Ok(Prepared::new(&region.clone(), watched, move || {
                region.advise(libc::MADV_MERGEABLE)?;
                let pid = rustix::process::getpid().as_raw_nonzero().get();
                let page = Page::open(pid, region.page(watched), Judge::Frame)
                    .map_err(io::Error::other)?;
                until_changed(&page, || Ok(()))
            }))
        },
    },
    Operation {
        name: "move_pages (to another node)",
        judge: Judge::Frame,
        claimed: CALL,
        prepare: || {
            let node = |number: &i32| {
                fs::exists(format!("/sys/devices/system/node/node{number}")).unwrap_or(false)
            };
            let nodes: Vec<i32> = (0..64).filter(node).collect();
            if nodes.len() < 2 {
                return Err("there is one node of memory".into());
            }
            let region = Region::anonymous(1)?;
            Ok(Prepared::new(&region.clone(), 0, move || {
                // The page may be on one of the two nodes already; for that node the kernel does
                // nothing.
                region.move_to(nodes[0])?;
                region.move_to(nodes[1])
            }))
        },
    },
];
