//! Records as JSON, one object a line.

use mmu_notifier::Blocking;
use mmu_source::process::ExitStatus;

use crate::digits::Put;
use crate::record::{Kind, Record, Span};

/// Appends `record`, made at `t` nanoseconds, to `out`. Allocates nothing if `out` has room.
pub(crate) fn write(out: &mut Vec<u8>, t: u64, record: &Record) {
    head(out, t, kind_name(record.kind));
    out.put(",\"pid\":");
    out.put_int(record.task.pid.into());
    out.put(",\"tid\":");
    out.put_int(record.task.tid.into());
    out.put(",\"mm\":");
    out.put_dec(record.mm);
    match record.kind {
        Kind::MmNew | Kind::MmRelease | Kind::Detach => {}
        Kind::Get { users } | Kind::Put { users } => number(out, "users", users.into()),
        Kind::Free => number(out, "users", 0),
        Kind::Start(span) => write_span(out, &span),
        Kind::End(span, result) => {
            write_span(out, &span);
            if let Some(result) = result {
                number(out, "result", result);
            }
        }
        Kind::Fork { child, child_mm } => {
            number(out, "child_pid", child.pid.into());
            number(out, "child_tid", child.tid.into());
            out.put(",\"child_mm\":");
            out.put_dec(child_mm);
        }
        Kind::Exec { old_mm } => {
            out.put(",\"old_mm\":");
            out.put_dec(old_mm);
        }
        Kind::Exit(ExitStatus::Code(code)) => number(out, "code", code.into()),
        Kind::Exit(ExitStatus::Signal(signal)) => number(out, "signal", signal.into()),
    }
    out.put("}\n");
}

/// The keys every line begins with.
pub(crate) fn head(out: &mut Vec<u8>, t: u64, kind: &str) {
    out.put("{\"v\":1,\"t\":");
    out.put_dec(t);
    out.put(",\"kind\":\"");
    out.put(kind);
    out.put("\"");
}

pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::MmNew => "mm_new",
        Kind::MmRelease => "mm_release",
        Kind::Get { .. } => "get",
        Kind::Put { .. } => "put",
        Kind::Free => "free",
        Kind::Start(_) => "start",
        Kind::End(..) => "end",
        Kind::Fork { .. } => "fork",
        Kind::Exec { .. } => "exec",
        Kind::Exit(_) => "exit",
        Kind::Detach => "detach",
    }
}

fn write_span(out: &mut Vec<u8>, span: &Span) {
    out.put(",\"event\":\"");
    out.put(span.event_name());
    out.put("\",\"cause\":\"");
    out.put(span.cause);
    out.put("\",\"start\":\"");
    out.put_hex(span.start().into());
    out.put("\",\"end\":\"");
    out.put_hex(span.end());
    out.put(match span.blocking {
        Blocking::Allowed => "\",\"blockable\":true",
        Blocking::Forbidden => "\",\"blockable\":false",
    });
}

fn number(out: &mut Vec<u8>, key: &str, value: i64) {
    out.put(",\"");
    out.put(key);
    out.put("\":");
    out.put_int(value);
}
