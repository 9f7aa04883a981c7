//! The table of operations.

mod advice;
mod files;
mod heap;
mod machine;
mod maps;
mod others;
mod tasks;

use super::operation::Operation;
use crate::source::Source::{self, Hook, Process, Uffd};

/// Who sees what goes through libc.
const LIBC: &[Source] = &[Hook, Process];
/// Who sees what is a memory call by any way.
const CALL: &[Source] = &[Process];
/// Who sees what goes through libc and ends or discards what userfaultfd can watch.
const LIBC_AND_UFFD: &[Source] = &[Hook, Uffd, Process];
/// Who sees the same where libc is not asked.
const CALL_AND_UFFD: &[Source] = &[Uffd, Process];
/// The kernel itself, without a call of any process.
const NOBODY: &[Source] = &[];

/// Every operation, in the order of the matrix.
pub(crate) fn all() -> impl Iterator<Item = &'static Operation> {
    let groups: [&'static [Operation]; 7] = [
        maps::OPERATIONS,
        heap::OPERATIONS,
        advice::OPERATIONS,
        files::OPERATIONS,
        tasks::OPERATIONS,
        others::OPERATIONS,
        machine::OPERATIONS,
    ];
    groups.into_iter().flatten()
}

pub(crate) fn named(name: &str) -> Option<&'static Operation> {
    all().find(|operation| operation.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_need_no_escape_in_json() {
        let names: Vec<&str> = all().map(|operation| operation.name).collect();
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{name} stands twice");
            assert!(
                name.bytes()
                    .all(|byte| (b' '..=b'~').contains(&byte) && byte != b'"' && byte != b'\\'),
                "{name}"
            );
        }
    }
}
