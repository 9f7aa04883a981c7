//! Names addresses after the end of the trace: symbols, lines and inlined functions.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use addr2line::gimli::{Dwarf, EndianSlice, LittleEndian, SectionId};
use addr2line::{Context, demangle_auto};
use object::read::{Object, ObjectSection, ObjectSymbol, ReadRef, SymbolKind};

use super::Address;
use super::aside;
use super::bounded::{Links, Source, regular};
use super::image::{Content, Image, Images};
use super::runtime::PerfMaps;
use super::site::Frame;

/// If a file's debug sections are larger than this together, only its symbols are used.
const MOST_DEBUG: u64 = 512 << 20;

/// The frames of each address, the innermost first: more than one where functions were inlined.
/// `wanted` is sorted.
pub(super) fn name(images: &Images, wanted: &[Address]) -> HashMap<Address, Vec<Frame>> {
    let mut named = HashMap::with_capacity(wanted.len());
    let mut maps = PerfMaps::default();
    let mut files = Vec::new();
    for group in wanted.chunk_by(|a, b| a.image == b.image) {
        let Some(image) = images.list.get(group[0].image as usize) else {
            let unknown = |address: &Address| (*address, vec![unnamed("[unknown]", address.at)]);
            named.extend(group.iter().map(unknown));
            continue;
        };
        let Content::Anonymous { pid, begin, user } = image.content else {
            files.push((image, group));
            continue;
        };
        for address in group {
            let frame = match maps.of(pid, user).name(address.at) {
                Some(function) => Frame {
                    function,
                    module: "[jit]".into(),
                    line: String::new(),
                    has_name: true,
                },
                None => unnamed(short(&image.path), address.at.saturating_sub(begin)),
            };
            named.insert(*address, vec![frame]);
        }
    }
    let found = aside::each(&files, |(image, group)| of_file(image, group));
    for ((image, group), mut found) in files.into_iter().zip(found) {
        found.resize(group.len(), Vec::new());
        for (address, mut frames) in group.iter().zip(found) {
            if frames.is_empty() {
                frames.push(unnamed(short(&image.path), address.at));
            }
            named.insert(*address, frames);
        }
    }
    named
}

/// A frame without a known function.
fn unnamed(module: &str, at: u64) -> Frame {
    Frame {
        function: format!("{module}+{at:#x}"),
        module: module.into(),
        line: String::new(),
        has_name: false,
    }
}

/// The last part of a path, without the suffix that the kernel adds for a deleted file.
fn short(path: &str) -> &str {
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    path.rsplit('/')
        .next()
        .filter(|name| !name.is_empty())
        .unwrap_or(path)
}

pub(super) fn of_file(image: &Image, group: &[Address]) -> Vec<Vec<Frame>> {
    let Some(reader) = image.content.reader() else {
        return Vec::new();
    };
    let source = Source::new(reader);
    let Some(elf) = source.elf() else {
        return Vec::new();
    };
    // A distribution installs symbols in a separate file.
    let id = elf.build_id().ok().flatten();
    let apart = id
        .and_then(debug_file)
        .map(|file| Source::new(Box::new(file)));
    let apart = apart.as_ref().and_then(Source::elf);
    let mut symbols = Vec::new();
    collect(&elf, group, &mut symbols);
    if let Some(apart) = &apart {
        collect(apart, group, &mut symbols);
    }
    symbols.sort_by_key(|(at, size, name)| (*at, *size, std::cmp::Reverse(name.starts_with('_'))));
    let debug = apart
        .as_ref()
        .filter(|apart| has_debug(apart))
        .or(Some(&elf).filter(|elf| has_debug(elf)));
    let sections = debug.map(Sections::read);
    let context = sections.as_ref().and_then(Sections::context);
    let module = short(&image.path);
    group
        .iter()
        .map(|address| frames(module, &symbols, context.as_ref(), address.at))
        .collect()
}

type Slice<'a> = EndianSlice<'a, LittleEndian>;

fn frames(
    module: &str,
    symbols: &[(u64, u64, Cow<'_, str>)],
    context: Option<&Context<Slice<'_>>>,
    at: u64,
) -> Vec<Frame> {
    let symbol = find(symbols, at);
    let mut list = Vec::new();
    let found = context.and_then(|context| context.find_frames(at).skip_all_loads().ok());
    if let Some(mut found) = found {
        while let Ok(Some(frame)) = found.next() {
            let name = frame
                .function
                .as_ref()
                .and_then(|name| Some(name.demangle().ok()?.into_owned()));
            let line = frame.location.and_then(|place| {
                let file = place.file?.rsplit('/').next()?;
                Some(
                    place
                        .line
                        .map_or_else(|| file.to_owned(), |line| format!("{file}:{line}")),
                )
            });
            let line = line.unwrap_or_default();
            match name {
                Some(function) => list.push(Frame {
                    function,
                    module: module.into(),
                    line,
                    has_name: true,
                }),
                None if symbol.is_none() => {
                    list.push(Frame {
                        line,
                        ..unnamed(module, at)
                    });
                }
                None => list.push(Frame {
                    line,
                    ..named(module, symbol.unwrap_or_default())
                }),
            }
            if list.len() == 64 {
                break;
            }
        }
    }
    if list.is_empty() {
        list.extend(symbol.map(|symbol| named(module, symbol)));
    }
    list
}

fn named(module: &str, symbol: &str) -> Frame {
    // Remove the version of a symbol: `malloc@@GLIBC_2.2.5`.
    let symbol = symbol.split_once('@').map_or(symbol, |(name, _)| name);
    // A symbol without one of these prefixes is a C name: `t` must not become `unsigned short`.
    let function = match symbol.starts_with("_Z") || symbol.starts_with("_R") {
        true => demangle_auto(symbol.into(), None).into_owned(),
        false => symbol.to_owned(),
    };
    Frame {
        function,
        module: module.into(),
        line: String::new(),
        has_name: true,
    }
}

/// The symbol that holds `at`. A symbol that ends before `at` is never returned.
fn find<'a>(symbols: &'a [(u64, u64, Cow<'_, str>)], at: u64) -> Option<&'a str> {
    let end = symbols.partition_point(|(start, ..)| *start <= at);
    // Aliases and nested symbols are close together.
    let near = symbols[..end].iter().rev().take(8);
    near.filter(|(start, size, _)| at - start < (*size).max(1))
        .map(|(.., name)| &**name)
        .next()
}

/// The symbols that contain one of the addresses: only few of a file's symbols are ever needed.
fn collect<'a, R: ReadRef<'a>>(
    elf: &object::File<'a, R>,
    group: &[Address],
    into: &mut Vec<(u64, u64, Cow<'a, str>)>,
) {
    let all = elf.symbols().chain(elf.dynamic_symbols());
    let functions = all.filter(|symbol| {
        symbol.kind() == SymbolKind::Text && symbol.is_definition() && symbol.size() > 0
    });
    let wanted = functions.filter(|symbol| {
        let next = group.partition_point(|address| address.at < symbol.address());
        group
            .get(next)
            .is_some_and(|address| address.at - symbol.address() < symbol.size())
    });
    into.extend(wanted.filter_map(|symbol| {
        let name = String::from_utf8_lossy(symbol.name_bytes().ok()?);
        Some((symbol.address(), symbol.size(), name))
    }));
}

fn has_debug<'a, R: ReadRef<'a>>(elf: &object::File<'a, R>) -> bool {
    let size = |name| {
        elf.section_by_name(name)
            .map_or(0, |section| section.size())
    };
    let total: u64 = [
        ".debug_info",
        ".debug_line",
        ".debug_str",
        ".debug_abbrev",
        ".debug_ranges",
        ".debug_rnglists",
    ]
    .into_iter()
    .map(size)
    .sum();
    elf.section_by_name(".debug_line").is_some() && total <= MOST_DEBUG
}

fn debug_file(id: &[u8]) -> Option<File> {
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let (directory, rest) = hex.split_at_checked(2)?;
    regular(
        Path::new(&format!(
            "/usr/lib/debug/.build-id/{directory}/{rest}.debug"
        )),
        Links::Follow,
    )
}

/// The debug sections of a file.
struct Sections<'a>(HashMap<SectionId, Cow<'a, [u8]>>);

impl<'a> Sections<'a> {
    fn read<R: ReadRef<'a>>(elf: &object::File<'a, R>) -> Sections<'a> {
        use SectionId::*;
        let ids = [
            DebugAbbrev,
            DebugAddr,
            DebugAranges,
            DebugInfo,
            DebugLine,
            DebugLineStr,
            DebugRanges,
            DebugRngLists,
            DebugStr,
            DebugStrOffsets,
        ];
        let read = |id: SectionId| {
            Some((
                id,
                elf.section_by_name(id.name())?.uncompressed_data().ok()?,
            ))
        };
        Sections(ids.into_iter().filter_map(read).collect())
    }

    fn context(&self) -> Option<Context<Slice<'_>>> {
        let load = |id: SectionId| -> Result<Slice<'_>, addr2line::gimli::Error> {
            Ok(EndianSlice::new(
                self.0.get(&id).map_or(&[], |data| data),
                LittleEndian,
            ))
        };
        Context::from_dwarf(Dwarf::load(load).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_symbol_names_nothing_beyond_its_size() {
        let symbols = [
            (0x10, 0x10, Cow::from("a")),
            (0x14, 4, Cow::from("inner")),
            (0x40, 1, Cow::from("b")),
        ];
        assert_eq!(
            (
                find(&symbols, 0x13),
                find(&symbols, 0x17),
                find(&symbols, 0x18)
            ),
            (Some("a"), Some("inner"), Some("a"))
        );
        assert_eq!(
            (
                find(&symbols, 0x20),
                find(&symbols, 0x41),
                find(&symbols, 0)
            ),
            (None, None, None)
        );
    }

    #[test]
    fn names_are_short_and_demangled() {
        assert_eq!(
            (
                short("/usr/lib/a.so (deleted)"),
                short("[vdso]"),
                short("/memfd:x (deleted)")
            ),
            ("a.so", "[vdso]", "memfd:x")
        );
        assert_eq!(named("m", "_ZN3foo3barEv").function, "foo::bar()");
        assert_eq!(named("m", "malloc@@GLIBC_2.2.5").function, "malloc");
        for name in ["t", "d", "St", "PKc"] {
            assert_eq!(named("m", name).function, name, "a name of C");
        }
    }
}
