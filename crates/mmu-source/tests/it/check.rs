//! Checks that hold for every log.

use std::collections::{HashMap, HashSet};

use crate::log::{Part, Record};

/// Checks that every start has an end and every get a put, that no `release` runs, that every
/// address space is freed once, and that the order is right.
pub(crate) fn pairs(records: &[Record]) {
    let mut open: Vec<&Part> = Vec::new();
    let mut held = HashSet::new();
    let mut mms: HashMap<u64, Life> = HashMap::new();
    let mut ended = HashSet::new();
    for record in records {
        match record {
            Record::New { mm, .. } => {
                let before = mms.insert(
                    *mm,
                    Life {
                        released: false,
                        freed: false,
                    },
                );
                assert!(before.is_none(), "address space {mm} appeared twice");
            }
            Record::Start(part) => {
                assert!(!mms[&part.mm].released, "{part:?} after release");
                assert!(
                    held.iter().any(|(_, mm)| *mm == part.mm),
                    "{part:?} in an address space without an owner"
                );
                open.push(part);
            }
            Record::End(part, _) => {
                let at = open.iter().rposition(|start| *start == part);
                open.remove(at.unwrap_or_else(|| panic!("an end without a start: {part:?}")));
            }
            Record::Get { task, mm } => {
                assert!(!mms[mm].released, "{task:?} enters {mm} after its release");
                assert!(held.insert((*task, *mm)), "{task:?} enters {mm} twice");
            }
            Record::Put { task, mm, .. } => {
                assert!(
                    held.remove(&(*task, *mm)),
                    "{task:?} leaves {mm} without having entered"
                );
                let left_open = open.iter().find(|part| part.task == *task);
                assert!(
                    left_open.is_none(),
                    "{task:?} leaves in a call: {left_open:?}"
                );
            }
            Record::Release { mm, .. } => {
                panic!("release of {mm}, though all its users had put theirs")
            }
            Record::Free { mm } => {
                let life = mms.get_mut(mm).expect("known");
                assert!(!life.freed, "{mm} is freed twice");
                assert!(
                    !held.iter().any(|(_, used)| used == mm),
                    "{mm} is freed while it is used"
                );
                life.freed = true;
                life.released = true;
            }
            Record::Fork { mm, child_mm, .. } => {
                assert!(mms.contains_key(mm) && mms.contains_key(child_mm));
            }
            Record::Exec { mm, old_mm, .. } => assert!(mms.contains_key(mm) && mm != old_mm),
            Record::Detach { task, .. } | Record::Exit { task, .. } => {
                assert!(
                    !held.iter().any(|(holder, _)| holder == task),
                    "{task:?} exits before it leaves"
                );
                ended.insert(*task);
            }
        }
    }
    assert!(open.is_empty(), "starts without an end: {open:?}");
    assert!(held.is_empty(), "gets without a put: {held:?}");
    let kept: Vec<&u64> = mms
        .iter()
        .filter(|(_, life)| !life.freed)
        .map(|(mm, _)| mm)
        .collect();
    assert!(kept.is_empty(), "never freed: {kept:?}");
}

struct Life {
    released: bool,
    freed: bool,
}
