//! Perfetto's protobuf: <https://ui.perfetto.dev> opens it.
//!
//! Written by hand: a message is a list of numbered fields, each a varint or a counted string. The
//! numbers are those of protos/perfetto/trace/trace_packet.proto and track_event/.

use std::collections::{BTreeMap, BTreeSet};

use super::{Detail, Value, change, given_back, life, number, site, space_name, tasks};
use crate::recording::Recording;

/// The numbers of the fields, a module for each message.
mod field {
    pub(super) mod trace {
        pub(in super::super) const PACKET: u32 = 1;
    }
    pub(super) mod packet {
        pub(in super::super) const TIMESTAMP: u32 = 8;
        pub(in super::super) const TRUSTED_PACKET_SEQUENCE_ID: u32 = 10;
        pub(in super::super) const TRACK_EVENT: u32 = 11;
        pub(in super::super) const TRACK_DESCRIPTOR: u32 = 60;
    }
    pub(super) mod event {
        pub(in super::super) const DEBUG_ANNOTATIONS: u32 = 4;
        pub(in super::super) const TYPE: u32 = 9;
        pub(in super::super) const TRACK_UUID: u32 = 11;
        pub(in super::super) const CATEGORIES: u32 = 22;
        pub(in super::super) const NAME: u32 = 23;
        pub(in super::super) const COUNTER_VALUE: u32 = 30;
    }
    pub(super) mod annotation {
        pub(in super::super) const INT_VALUE: u32 = 4;
        pub(in super::super) const STRING_VALUE: u32 = 6;
        pub(in super::super) const NAME: u32 = 10;
    }
    pub(super) mod track {
        pub(in super::super) const UUID: u32 = 1;
        pub(in super::super) const NAME: u32 = 2;
        pub(in super::super) const PROCESS: u32 = 3;
        pub(in super::super) const THREAD: u32 = 4;
        pub(in super::super) const PARENT_UUID: u32 = 5;
        pub(in super::super) const COUNTER: u32 = 8;
    }
    pub(super) mod process {
        pub(in super::super) const PID: u32 = 1;
        pub(in super::super) const NAME: u32 = 6;
    }
    pub(super) mod thread {
        pub(in super::super) const PID: u32 = 1;
        pub(in super::super) const TID: u32 = 2;
        pub(in super::super) const NAME: u32 = 5;
    }
    pub(super) mod counter {
        pub(in super::super) const UNIT: u32 = 3;
    }
}

/// `TrackEvent.Type`.
#[derive(Clone, Copy)]
enum Type {
    Begin = 1,
    End = 2,
    Instant = 3,
    Counter = 4,
}

/// `CounterDescriptor.Unit.UNIT_SIZE_BYTES`.
const BYTES: u64 = 3;

/// A message.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(mut self, field: u32, value: u64) -> Message {
        self.varint(u64::from(field) << 3);
        self.varint(value);
        self
    }

    fn bytes(mut self, field: u32, bytes: &[u8]) -> Message {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    fn message(self, field: u32, message: &Message) -> Message {
        self.bytes(field, &message.0)
    }

    fn details(self, details: &[Detail]) -> Message {
        details.iter().fold(self, |message, (name, value)| {
            let annotation = Message::default().bytes(field::annotation::NAME, name.as_bytes());
            let annotation = match value {
                Value::Text(text) => {
                    annotation.bytes(field::annotation::STRING_VALUE, text.as_bytes())
                }
                Value::Number(number) => {
                    annotation.number(field::annotation::INT_VALUE, *number as u64)
                }
            };
            message.message(field::event::DEBUG_ANNOTATIONS, &annotation)
        })
    }
}

/// The subject of a track.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Track {
    Process(i32),
    Thread(i32, i32),
    GivenBack(u64),
    Space(u64),
}

struct Writer {
    trace: Message,
    tracks: BTreeMap<Track, u64>,
}

impl Writer {
    fn packet(&mut self, packet: &Message) {
        self.trace = std::mem::take(&mut self.trace).message(field::trace::PACKET, packet);
    }

    fn track(
        &mut self,
        track: Track,
        parent: Option<Track>,
        write: impl FnOnce(Message) -> Message,
    ) {
        let uuid = self.tracks.len() as u64 + 1;
        self.tracks.insert(track, uuid);
        let mut descriptor = Message::default().number(field::track::UUID, uuid);
        if let Some(parent) = parent.and_then(|parent| self.tracks.get(&parent)) {
            descriptor = descriptor.number(field::track::PARENT_UUID, *parent);
        }
        let descriptor = write(descriptor);
        self.packet(&Message::default().message(field::packet::TRACK_DESCRIPTOR, &descriptor));
    }

    fn event(&mut self, t: u64, of: Track, kind: Type, write: impl FnOnce(Message) -> Message) {
        let Some(uuid) = self.tracks.get(&of) else {
            return;
        };
        let event = Message::default()
            .number(field::event::TYPE, kind as u64)
            .number(field::event::TRACK_UUID, *uuid);
        let packet = Message::default()
            .number(field::packet::TIMESTAMP, t)
            .number(field::packet::TRUSTED_PACKET_SEQUENCE_ID, 1)
            .message(field::packet::TRACK_EVENT, &write(event));
        self.packet(&packet);
    }
}

/// Makes one track for each process and each task, and two for each address space: its life, and
/// the memory that it has returned.
pub(crate) fn make(recording: &Recording) -> Vec<u8> {
    let mut writer = Writer {
        trace: Message::default(),
        tracks: BTreeMap::new(),
    };
    describe(&mut writer, recording);
    for changed in &recording.changes {
        let (name, details) = change(recording, changed);
        let task = changed.change.task;
        let track = Track::Thread(task.pid, task.tid);
        writer.event(changed.change.began, track, Type::Begin, |event| {
            titled(event, name, changed.change.span.event_name()).details(&details)
        });
        writer.event(changed.change.ended, track, Type::End, |event| event);
    }
    for (t, mm, bytes) in given_back(recording) {
        writer.event(t, Track::GivenBack(mm), Type::Counter, |event| {
            event.number(field::event::COUNTER_VALUE, bytes)
        });
    }
    for born in &recording.births {
        let task = born.task;
        let mut details = vec![(
            "bytes",
            number(born.mapping.range.pages().saturating_mul(4096)),
        )];
        details.extend(site(recording, born.site));
        writer.event(
            born.t,
            Track::Thread(task.pid, task.tid),
            Type::Instant,
            |event| titled(event, born.mapping.cause, "map").details(&details),
        );
    }
    for lived in &recording.life {
        let task = lived.record.task;
        writer.event(
            lived.t,
            Track::Thread(task.pid, task.tid),
            Type::Instant,
            |event| titled(event, lived.record.kind.of_line().name(), "life").details(&life(lived)),
        );
    }
    for (mm, space) in &recording.spaces {
        let name = space_name(recording, *mm);
        writer.event(space.began, Track::Space(*mm), Type::Begin, |event| {
            titled(event, &name, "life")
        });
        writer.event(space.ended, Track::Space(*mm), Type::End, |event| event);
    }
    writer.trace.0
}

fn titled(event: Message, name: &str, category: &str) -> Message {
    event
        .bytes(field::event::CATEGORIES, category.as_bytes())
        .bytes(field::event::NAME, name.as_bytes())
}

fn describe(writer: &mut Writer, recording: &Recording) {
    let tasks = tasks(recording);
    let processes: BTreeSet<i32> = tasks
        .keys()
        .map(|(pid, _)| *pid)
        .chain(recording.spaces.values().map(|space| space.pid))
        .collect();
    for pid in processes {
        let name = tasks.get(&(pid, pid)).copied().unwrap_or_default();
        let process = Message::default()
            .number(field::process::PID, pid as u64)
            .bytes(field::process::NAME, name.as_bytes());
        writer.track(Track::Process(pid), None, |track| {
            track.message(field::track::PROCESS, &process)
        });
    }
    for ((pid, tid), name) in &tasks {
        let thread = Message::default()
            .number(field::thread::PID, *pid as u64)
            .number(field::thread::TID, *tid as u64)
            .bytes(field::thread::NAME, name.as_bytes());
        writer.track(
            Track::Thread(*pid, *tid),
            Some(Track::Process(*pid)),
            |track| track.message(field::track::THREAD, &thread),
        );
    }
    for (mm, space) in &recording.spaces {
        let (name, parent) = (space_name(recording, *mm), Some(Track::Process(space.pid)));
        writer.track(Track::Space(*mm), parent, |track| {
            track.bytes(field::track::NAME, name.as_bytes())
        });
        let (name, unit) = (
            format!("given back, {name}"),
            Message::default().number(field::counter::UNIT, BYTES),
        );
        writer.track(Track::GivenBack(*mm), parent, |track| {
            track
                .bytes(field::track::NAME, name.as_bytes())
                .message(field::track::COUNTER, &unit)
        });
    }
}

/// The fields of a message: number, and a varint or bytes.
#[cfg(test)]
fn fields(mut bytes: &[u8]) -> Vec<(u32, u64, &[u8])> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let count = bytes
            .iter()
            .position(|byte| byte & 0x80 == 0)
            .expect("it ends")
            + 1;
        let (now, rest) = bytes.split_at(count);
        *bytes = rest;
        now.iter()
            .rev()
            .fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f))
    }
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let value = varint(&mut bytes);
        let (text, rest) = bytes.split_at(if key & 7 == 2 { value as usize } else { 0 });
        bytes = rest;
        all.push(((key >> 3) as u32, value, text));
    }
    all
}

/// An event as a reader finds it.
#[cfg(test)]
#[derive(Debug, Default)]
pub(super) struct ReadBack {
    pub(super) kind: u64,
    pub(super) track: u64,
    pub(super) t: u64,
    pub(super) name: String,
    pub(super) category: String,
    pub(super) pid: u64,
    /// The thread id of a thread's track.
    pub(super) tid: Option<u64>,
    pub(super) counter: u64,
    pub(super) details: BTreeMap<String, String>,
}

/// All events, in order, each with the pid and the thread id of its track. A counter's event has
/// the name of its track, and the pid of the process that is the track's parent.
#[cfg(test)]
pub(super) fn read_back(trace: &[u8]) -> Vec<ReadBack> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let (mut tracks, mut all) = (BTreeMap::<u64, ReadBack>::new(), Vec::new());
    for (_, _, packet) in fields(trace) {
        let mut event = ReadBack::default();
        for (number, value, bytes) in fields(packet) {
            match number {
                field::packet::TIMESTAMP => event.t = value,
                field::packet::TRACK_DESCRIPTOR => {
                    let mut track = ReadBack::default();
                    for (number, value, bytes) in fields(bytes) {
                        match number {
                            field::track::UUID => event.track = value,
                            field::track::NAME => track.name = text(bytes),
                            field::track::PARENT_UUID => track.pid = tracks[&value].pid,
                            field::track::PROCESS => track.pid = fields(bytes)[0].1,
                            field::track::THREAD => {
                                track.pid = fields(bytes)[0].1;
                                track.tid = Some(fields(bytes)[1].1);
                            }
                            _ => {}
                        }
                    }
                    tracks.insert(event.track, track);
                }
                field::packet::TRACK_EVENT => {
                    for (number, value, bytes) in fields(bytes) {
                        match number {
                            field::event::TYPE => event.kind = value,
                            field::event::TRACK_UUID => event.track = value,
                            field::event::CATEGORIES => event.category = text(bytes),
                            field::event::NAME => event.name = text(bytes),
                            field::event::COUNTER_VALUE => event.counter = value,
                            field::event::DEBUG_ANNOTATIONS => {
                                let said = fields(bytes);
                                let value = match said[1].0 {
                                    field::annotation::STRING_VALUE => text(said[1].2),
                                    _ => (said[1].1 as i64).to_string(),
                                };
                                event.details.insert(text(said[0].2), value);
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if event.kind > 0 {
            let track = &tracks[&event.track];
            (event.pid, event.tid) = (track.pid, track.tid);
            if event.kind == Type::Counter as u64 {
                event.name.clone_from(&track.name);
            }
            all.push(event);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::tests::{by_another, recording};
    use super::*;

    #[test]
    fn numbers_are_written_in_sevens() {
        for (value, bytes) in [
            (0, &[0][..]),
            (127, &[127]),
            (128, &[0x80, 1]),
            (300, &[0xac, 2]),
        ] {
            let mut message = Message::default();
            message.varint(value);
            assert_eq!(message.0, bytes);
        }
        let mut message = Message::default();
        message.varint(u64::MAX);
        assert_eq!(message.0.len(), 10);
    }

    /// Compares the bytes with a golden file. `tests/it/viewers.rs` checks that Perfetto can read
    /// such bytes, if its package is installed.
    #[test]
    fn the_bytes_do_not_change_unseen() {
        let golden: &[u8] = include_bytes!("golden.pftrace");
        assert!(make(&recording()) == golden);
    }

    #[test]
    fn every_slice_that_begins_ends_on_its_track() {
        slices_end(&recording());
    }

    #[test]
    fn a_mapping_is_shown_though_its_task_did_nothing_else() {
        slices_end(&by_another());
    }

    fn slices_end(recording: &Recording) {
        let trace = make(recording);
        let (mut open, mut kinds) = (BTreeMap::new(), BTreeMap::new());
        let mut tracks = BTreeSet::new();
        for (number, _, packet) in fields(&trace) {
            assert_eq!(number, field::trace::PACKET);
            let of = |wanted| {
                fields(packet)
                    .into_iter()
                    .find(|(number, ..)| *number == wanted)
            };
            if let Some((.., descriptor)) = of(field::packet::TRACK_DESCRIPTOR) {
                assert!(
                    tracks.insert(fields(descriptor)[0].1),
                    "two tracks of one number"
                );
                continue;
            }
            let (.., event) = of(field::packet::TRACK_EVENT).expect("it is an event");
            let [(_, kind, _), (_, track, _), ..] = fields(event)[..] else {
                panic!("no type")
            };
            assert!(tracks.contains(&track) && of(field::packet::TIMESTAMP).is_some());
            *kinds.entry(kind).or_insert(0) += 1;
            *open.entry(track).or_insert(0) += match kind {
                1 => 1,
                2 => -1,
                _ => 0,
            };
        }
        assert!(open.values().all(|count| *count == 0));
        assert_eq!(kinds, BTreeMap::from([(1, 2), (2, 2), (3, 5), (4, 1)]));
    }
}
