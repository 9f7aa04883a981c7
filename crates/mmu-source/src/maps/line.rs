//! A line of `/proc/PID/maps`. The fuzz target `maps` compiles this file alone.

/// One mapping of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) writable: bool,
    pub(crate) private: bool,
    pub(crate) offset: u64,
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    pub(crate) kind: Kind,
}

/// The kind of a mapping, from the last column. Only the kinds that this crate needs are
/// distinguished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Heap,
    SysV,
    Aio,
    Other,
}

/// Parses one line, such as `7f00-8f00 rw-p 00000000 00:01 12 /SYSV00000000 (deleted)`.
pub(crate) fn parse(line: &[u8]) -> Option<Mapping> {
    // A path may contain any byte except a newline. Only the columns before the path must be text.
    let mut columns = line
        .splitn(6, |byte| *byte == b' ')
        .map(|column| std::str::from_utf8(column));
    let mut next = || columns.next()?.ok();
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = next()?.split_once('-')?;
    let flags = next()?.as_bytes();
    let offset = hex(next()?)?;
    let (major, minor) = next()?.split_once(':')?;
    let inode = next()?.parse().ok()?;
    let path = line
        .splitn(6, |byte| *byte == b' ')
        .nth(5)
        .unwrap_or_default()
        .trim_ascii_start();
    let kind = match path {
        b"[heap]" => Kind::Heap,
        path if path.starts_with(b"/SYSV") => Kind::SysV,
        path if path.starts_with(b"/[aio]") => Kind::Aio,
        _ => Kind::Other,
    };
    Some(Mapping {
        start: hex(start)?,
        end: hex(end)?,
        writable: flags.get(1) == Some(&b'w'),
        private: flags.get(3) == Some(&b'p'),
        offset,
        device: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode,
        kind,
    })
}
