//! Records as JSON, one object a line.

use mmu_notifier::Blocking;
use mmu_source::process::ExitStatus;

use crate::digits::Put;
use crate::kind::LineKind;
use crate::record::{Extra, Kind, Mapping, Record, Span};

/// Appends `record`, made `t` nanoseconds after the trace began, to `out`. Allocates nothing if
/// `out` has room.
pub(crate) fn write(out: &mut Vec<u8>, t: u64, record: &Record, extra: &Extra<'_>) {
    head(out, t, record.kind.of_line());
    out.put(",\"pid\":");
    out.put_int(record.task.pid.into());
    out.put(",\"tid\":");
    out.put_int(record.task.tid.into());
    out.put(",\"mm\":");
    out.put_dec(record.mm);
    match record.kind {
        Kind::MmNew { .. } | Kind::MmRelease | Kind::Detach => {}
        Kind::Get { users } | Kind::Put { users } => number(out, "users", users.into()),
        Kind::Free => number(out, "users", 0),
        Kind::Start(span) => write_span(out, &span),
        Kind::End(span, result) => {
            write_span(out, &span);
            if let Some(result) = result {
                number(out, "result", result);
            }
        }
        Kind::Map(Mapping { cause, range }) => {
            put_cause(out, cause);
            let (start, end) = (range.start().get(), u128::from(range.last().get()) + 1);
            range_in_hex(out, start, end);
            range_in_numbers(out, start, end);
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
    write_extra(out, extra);
    out.put("}\n");
}

/// The keys every line begins with.
pub(crate) fn head(out: &mut Vec<u8>, t: u64, kind: LineKind) {
    out.put("{\"v\":1,\"t\":");
    out.put_dec(t);
    out.put(",\"kind\":\"");
    out.put(kind.name());
    out.put("\"");
}

fn write_span(out: &mut Vec<u8>, span: &Span) {
    out.put(",\"event\":\"");
    out.put(span.event_name());
    out.put("\"");
    put_cause(out, span.cause);
    range_in_hex(out, span.start(), span.end());
    out.put(match span.blocking {
        Blocking::Allowed => ",\"blockable\":true",
        Blocking::Forbidden => ",\"blockable\":false",
    });
    range_in_numbers(out, span.start(), span.end());
}

fn put_cause(out: &mut Vec<u8>, cause: &str) {
    out.put(",\"cause\":\"");
    out.put(cause);
    out.put("\"");
}

fn range_in_hex(out: &mut Vec<u8>, start: u64, end: u128) {
    out.put(",\"start\":\"");
    out.put_hex(start.into());
    out.put("\",\"end\":\"");
    out.put_hex(end);
    out.put("\"");
}

/// Writes the range as numbers. The length of the whole address space is one byte short, to fit 64
/// bits.
fn range_in_numbers(out: &mut Vec<u8>, start: u64, end: u128) {
    out.put(",\"address\":");
    out.put_dec(start);
    out.put(",\"bytes\":");
    out.put_dec(u64::try_from(end - u128::from(start)).unwrap_or(u64::MAX));
}

fn write_extra(out: &mut Vec<u8>, extra: &Extra<'_>) {
    if !extra.comm.is_empty() {
        out.put(",\"comm\":");
        put_str(out, extra.comm);
    }
    for (key, text) in [(",\"program\":", extra.program), (",\"what\":", extra.what)] {
        if let Some(text) = text {
            out.put(key);
            put_str(out, text);
        }
    }
    if let Some(pages) = extra.pages {
        for (key, bytes) in [
            (",\"resident\":", pages.resident),
            (",\"file\":", pages.file),
            (",\"huge\":", pages.huge),
            (",\"swapped\":", pages.swapped),
        ] {
            out.put(key);
            out.put_dec(bytes);
        }
    }
    if let Some(site) = extra.site {
        out.put(",\"site\":");
        out.put_dec(site.into());
    }
    if let Some(own) = extra.own {
        out.put(",\"self\":");
        out.put_dec(own);
    }
}

/// Appends a string with its quotes.
pub(crate) fn put_str(out: &mut Vec<u8>, text: &str) {
    out.put("\"");
    let mut plain = 0;
    for (at, byte) in text.bytes().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.put(&text[plain..at]);
        match byte {
            b'"' => out.put("\\\""),
            b'\\' => out.put("\\\\"),
            b'\n' => out.put("\\n"),
            other => {
                out.put(if other < 0x10 { "\\u000" } else { "\\u001" });
                out.push(b"0123456789abcdef"[usize::from(other & 0xf)]);
            }
        }
        plain = at + 1;
    }
    out.put(&text[plain..]);
    out.put("\"");
}

fn number(out: &mut Vec<u8>, key: &str, value: i64) {
    out.put(",\"");
    out.put(key);
    out.put("\":");
    out.put_int(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_string_comes_back_as_it_was() {
        for text in ["", "plain", "a\"b\\c", "\n\t\u{1}\u{1f}", "grüße \u{1f600}"] {
            let mut out = Vec::new();
            put_str(&mut out, text);
            assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }
    }
}
