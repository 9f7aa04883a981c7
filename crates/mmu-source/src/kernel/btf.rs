//! Finds the offset of a struct member in the running kernel, from the kernel's description of its
//! types (BTF).
//!
//! A BTF file has a header, the types, and their names. Each type has a number, which is its
//! position in the file, counted from 1. The length of a type depends on its kind. The BTF of a
//! module describes only the module's own types; its type numbers and name offsets continue those
//! of `vmlinux`. The parser accepts any bytes, and stops at the first type that it cannot parse.
//!
//! # Source
//! `Documentation/bpf/btf.rst`, Linux 6.12.

/// The kinds whose members are searched.
const STRUCT: u32 = 4;
const UNION: u32 = 5;
/// The largest nesting depth of anonymous members.
const DEPTH: u32 = 8;
/// How many anonymous members are searched for one member. The kernel's largest struct has some
/// ten.
const NAMELESS: u32 = 1000;

/// One BTF file.
#[derive(Debug, Clone, Copy)]
struct Part<'a> {
    types: &'a [u8],
    names: &'a [u8],
}

/// The types of the kernel, or of the kernel and one of its modules.
#[derive(Debug)]
pub(super) struct Btf<'a> {
    base: Part<'a>,
    /// The module's file, and the number of its first type.
    module: Option<(Part<'a>, u32)>,
}

#[derive(Debug, Clone, Copy)]
struct Type<'a> {
    name: u32,
    kind: u32,
    /// Whether the upper bits of a member's offset hold its size in bits.
    has_sizes: bool,
    /// Twelve bytes for each member of a struct or union.
    members: &'a [u8],
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().expect("four bytes")))
}

impl<'a> Part<'a> {
    fn parse(file: &'a [u8]) -> Option<Self> {
        const MAGIC: u32 = 0xeb9f;
        if word(file, 0)? & 0xffff != MAGIC {
            return None;
        }
        let header = word(file, 4)? as usize;
        let section = |at: usize| {
            let start = header.checked_add(word(file, at)? as usize)?;
            file.get(start..start.checked_add(word(file, at + 4)? as usize)?)
        };
        Some(Self {
            types: section(8)?,
            names: section(16)?,
        })
    }

    fn types(self) -> Types<'a> {
        Types { rest: self.types }
    }

    /// Tells whether the name at `offset` is `name`.
    fn is_named(self, offset: u32, name: &str) -> bool {
        let end = offset as usize + name.len();
        self.names.get(offset as usize..end) == Some(name.as_bytes())
            && self.names.get(end) == Some(&0)
    }
}

/// Iterates over the types of a file, in order.
struct Types<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Types<'a> {
    type Item = Type<'a>;

    fn next(&mut self) -> Option<Type<'a>> {
        let (name, info) = (word(self.rest, 0)?, word(self.rest, 4)?);
        let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
        let more = match kind {
            1 | 14 | 17 => 4,          // Integers, variables, tags of declarations.
            2 | 7..=12 | 16 | 18 => 0, // Pointers, forwards, other names, qualifiers, functions, floats, tags.
            3 => 12,                   // Arrays.
            STRUCT | UNION | 15 | 19 => 12 * count, // The same size for sections and enumerations of 64 bits.
            6 | 13 => 8 * count,                    // Enumerations, prototypes.
            _ => return None,
        };
        let members = self.rest.get(12..12 + more)?;
        self.rest = &self.rest[12 + more..];
        Some(Type {
            name,
            kind,
            has_sizes: info >> 31 != 0,
            members,
        })
    }
}

impl<'a> Btf<'a> {
    /// Parses the kernel's file, and that of a module if one is given.
    #[must_use]
    pub(super) fn parse(vmlinux: &'a [u8], module: Option<&'a [u8]>) -> Option<Self> {
        let base = Part::parse(vmlinux)?;
        let module = match module {
            // Number 0 is `void`, which has no entry.
            Some(file) => Some((
                Part::parse(file)?,
                u32::try_from(base.types().count()).ok()? + 1,
            )),
            None => None,
        };
        Some(Self { base, module })
    }

    fn all(&self) -> impl Iterator<Item = Type<'a>> + use<'a> {
        let module = self
            .module
            .map(|(part, _)| part.types())
            .into_iter()
            .flatten();
        self.base.types().chain(module)
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        match self.module {
            Some((part, _)) if offset as usize >= self.base.names.len() => {
                part.is_named(offset - self.base.names.len() as u32, name)
            }
            _ => self.base.is_named(offset, name),
        }
    }

    /// Returns the byte offset of `member` in the struct `name`. The member may be inside an
    /// anonymous struct or union.
    #[must_use]
    pub(super) fn offset(&self, name: &str, member: &str) -> Option<u32> {
        let is_it = |found: &Type<'_>| found.kind == STRUCT && self.is_named(found.name, name);
        // In invalid input, anonymous members can be nested without end.
        let mut left = NAMELESS;
        // Several types can have the same name. Those without the member are other declarations.
        self.all()
            .filter(is_it)
            .find_map(|found| self.bit_in(&found, member, DEPTH, &mut left))
            .and_then(|bit| (bit % 8 == 0).then_some(bit / 8))
    }

    fn bit_in(&self, parent: &Type<'a>, member: &str, depth: u32, left: &mut u32) -> Option<u32> {
        parent.members.chunks_exact(12).find_map(|entry| {
            let [name, number, place] = [word(entry, 0)?, word(entry, 4)?, word(entry, 8)?];
            let bit = if parent.has_sizes {
                place & 0xff_ffff
            } else {
                place
            };
            if self.is_named(name, member) {
                return Some(bit);
            }
            if name != 0 || depth == 0 {
                return None;
            }
            *left = left.checked_sub(1)?;
            let inner = self.all().nth((number as usize).checked_sub(1)?)?;
            let is_nested = inner.kind == STRUCT || inner.kind == UNION;
            is_nested
                .then(|| self.bit_in(&inner, member, depth - 1, left))
                .flatten()?
                .checked_add(bit)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes BTF for the tests.
    #[derive(Default)]
    struct Writer {
        types: Vec<u32>,
        names: Vec<u8>,
        /// The offset of the first name.
        first: u32,
    }

    impl Writer {
        fn name(&mut self, name: &str) -> u32 {
            let at = self.first + self.names.len() as u32;
            self.names.extend(name.bytes().chain([0]));
            at
        }

        fn add(&mut self, kind: u32, name: &str, members: &[(&str, u32, u32)]) {
            let name = if name.is_empty() { 0 } else { self.name(name) };
            self.types
                .extend([name, kind << 24 | members.len() as u32, 0]);
            for (member, number, bit) in members {
                let member = if member.is_empty() {
                    0
                } else {
                    self.name(member)
                };
                self.types.extend([member, *number, *bit]);
            }
        }

        fn file(&self) -> Vec<u8> {
            let types = 4 * self.types.len() as u32;
            let header = [0x1_eb9f, 24, 0, types, types, self.names.len() as u32];
            let words = header
                .iter()
                .chain(&self.types)
                .flat_map(|word| word.to_le_bytes());
            words.chain(self.names.iter().copied()).collect()
        }
    }

    #[test]
    fn members_are_found_where_they_lie_in_nameless_parts_and_in_modules() {
        let mut vmlinux = Writer::default();
        vmlinux.name("");
        vmlinux.add(STRUCT, "file", &[("f_op", 9, 64), ("", 2, 128)]);
        vmlinux.add(UNION, "", &[("data", 9, 0), ("", 3, 64)]);
        vmlinux.add(STRUCT, "", &[("private_data", 9, 32)]);
        let base = vmlinux.file();
        let mut module = Writer {
            first: vmlinux.names.len() as u32,
            ..Writer::default()
        };
        module.add(STRUCT, "kvm", &[("count", 9, 800), ("", 3, 160)]);
        let over = module.file();
        let btf = Btf::parse(&base, Some(&over)).expect("it is well formed");
        assert_eq!(btf.offset("file", "f_op"), Some(8));
        assert_eq!(btf.offset("file", "private_data"), Some(28));
        assert_eq!(btf.offset("kvm", "count"), Some(100));
        assert_eq!(
            btf.offset("kvm", "private_data"),
            Some(24),
            "a module's struct with a part of the kernel's"
        );
        assert_eq!(
            (
                btf.offset("kvm", "f_op"),
                btf.offset("fil", "f_op"),
                btf.offset("files", "f_op")
            ),
            (None, None, None)
        );
        assert_eq!(
            Btf::parse(&base, None)
                .expect("well formed")
                .offset("kvm", "count"),
            None
        );
    }

    #[test]
    fn parts_of_parts_without_an_end_are_not_followed_for_ever() {
        let mut whole = Writer::default();
        whole.name("");
        whole.add(STRUCT, "a", &[("", 1, 0); 300]);
        assert_eq!(
            Btf::parse(&whole.file(), None)
                .expect("well formed")
                .offset("a", "c"),
            None
        );
    }

    #[test]
    fn bytes_that_are_no_description_have_no_members() {
        let mut whole = Writer::default();
        whole.name("");
        whole.add(STRUCT, "a", &[("", 1, 0), ("b", 1, 8)]);
        let whole = whole.file();
        assert_eq!(
            Btf::parse(&whole, None)
                .expect("well formed")
                .offset("a", "b"),
            Some(1)
        );
        assert_eq!(
            Btf::parse(&whole, None)
                .expect("well formed")
                .offset("a", "c"),
            None,
            "it is a part of itself"
        );
        for length in 0..whole.len() {
            let cut = Btf::parse(&whole[..length], None);
            assert_eq!(
                cut.and_then(|btf| btf.offset("a", "b")),
                None,
                "cut to {length}"
            );
        }
        for at in 0..whole.len() {
            let mut bent = whole.clone();
            bent[at] ^= 0xff;
            let _ = Btf::parse(&bent, Some(&whole)).map(|btf| btf.offset("a", "b"));
        }
    }
}
