//! Named stacks, and the frame of each stack that is the place of the call.

use std::collections::HashMap;

use crate::digits::Put;
use crate::json;
use crate::kind::LineKind;

/// One function on a stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Frame {
    /// The function's name, or a text like `libc.so.6+0x27249`.
    pub(crate) function: String,
    /// The name of the function's file, without directories.
    pub(crate) module: String,
    /// `file.c:12`, or empty.
    pub(crate) line: String,
    pub(crate) has_name: bool,
}

/// The prefixes of a dynamic loader's file name.
const LOADERS: [&str; 2] = ["ld-linux", "ld-musl"];

impl Frame {
    /// Whether the frame is in the dynamic loader. Such a frame is the place only if the whole
    /// stack is in the loader, libc or allocators, as before the program begins.
    pub(crate) fn is_loader(&self) -> bool {
        LOADERS.iter().any(|name| self.module.starts_with(name))
    }

    /// The common text for all of the loader's functions.
    pub(crate) fn loader_text(&self) -> String {
        format!("the loader, before the program begins ({})", self.module)
    }

    /// `f (module file.c:12)`
    pub(crate) fn text(&self) -> String {
        let Frame {
            function,
            module,
            line,
            has_name,
        } = self;
        match (has_name, line.as_str()) {
            (true, "") => format!("{function} ({module})"),
            (true, line) => format!("{function} ({module} {line})"),
            (false, "") => function.clone(),
            (false, line) => format!("{function} ({line})"),
        }
    }
}

/// A stack, the innermost frame first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stack {
    pub(crate) frames: Vec<Frame>,
    /// The index of the frame that is the place of the call.
    pub(crate) place: usize,
    /// Frames may be missing: unwind tables were too large to be read, or the stack has more frames
    /// than are kept.
    pub(crate) is_partial: bool,
}

impl Stack {
    /// The place of the call, for tables.
    pub(crate) fn place(&self) -> String {
        match self.frames.get(self.place) {
            Some(frame) if frame.is_loader() => frame.loader_text(),
            Some(frame) => frame.text(),
            None => UNKNOWN.to_owned(),
        }
    }
}

const UNKNOWN: &str = "(not known)";

/// Every stack of a trace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Resolved {
    stacks: HashMap<u32, Stack>,
}

/// Functions that make memory calls for their callers, by names without leading underscores.
const ALLOCATORS: &[&str] = &[
    "munmap",
    "mmap",
    "mmap64",
    "mprotect",
    "madvise",
    "mremap",
    "brk",
    "sbrk",
    "syscall",
    "syscall_cancel",
    "posix_madvise",
    "free",
    "cfree",
    "malloc",
    "calloc",
    "realloc",
    "reallocarray",
    "memalign",
    "aligned_alloc",
    "posix_memalign",
    "valloc",
    "malloc_trim",
    "munmap_chunk",
    "int_free",
    "int_malloc",
    "int_realloc",
    "int_memalign",
    "systrim",
    "sysmalloc",
    "heap_trim",
    "shrink_heap",
    "grow_heap",
    "mtrim",
    "default_morecore",
    "glibc_morecore",
    "PyObject_Free",
    "PyObject_Malloc",
    "PyObject_Realloc",
    "PyObject_Calloc",
    "PyMem_Free",
    "PyMem_Malloc",
    "PyMem_Realloc",
    "PyMem_RawFree",
    "PyMem_RawMalloc",
    "PyMem_RawRealloc",
    "PyObject_Arena",
    "new_arena",
    "insert_to_freepool",
    "insert_to_usedpool",
    "allocate_from_new_pool",
    "PyObject_ArenaMmap",
    "PyObject_ArenaMunmap",
    "PyMem_ArenaFree",
    "PyMem_ArenaAlloc",
    "pymalloc_alloc",
    "pymalloc_free",
    "rust_alloc",
    "rust_dealloc",
    "rust_realloc",
    "rdl_dealloc",
    "rdl_realloc",
    "rdl_alloc",
    "operator delete(void*)",
    "operator delete[](void*)",
    "operator new(unsigned long)",
    "operator new[](unsigned long)",
    "operator delete(void*, unsigned long)",
    "operator delete[](void*, unsigned long)",
    "fork",
    "Fork",
    "libc_fork",
    "vfork",
    "clone",
    "clone3",
];

/// Libraries, besides the loader, whose functions are never the place: the C library and
/// allocators.
const LIBRARIES: &[&str] = &[
    "libc.so",
    "libc-2",
    "libpthread",
    "libc.musl",
    "libjemalloc",
    "libmimalloc",
    "libtcmalloc",
];

impl Resolved {
    pub(crate) fn new(
        stacks: impl IntoIterator<Item = (u32, Vec<Frame>, bool)>,
        skip: &[String],
    ) -> Resolved {
        let with_place = |frames: Vec<Frame>, is_partial| {
            let at = frames.iter().position(|frame| !is_allocator(frame, skip));
            // No frame can be the place: use the outermost frame with a name, else the innermost.
            let at = at
                .or_else(|| frames.iter().rposition(|frame| frame.has_name))
                .unwrap_or(0);
            Stack {
                frames,
                place: at,
                is_partial,
            }
        };
        Resolved::of(
            stacks
                .into_iter()
                .map(|(number, frames, is_partial)| (number, with_place(frames, is_partial))),
        )
    }

    /// Stacks whose places are known.
    pub(crate) fn of(stacks: impl IntoIterator<Item = (u32, Stack)>) -> Resolved {
        Resolved {
            stacks: stacks.into_iter().collect(),
        }
    }

    /// How many stacks may lack frames.
    pub(crate) fn partial(&self) -> usize {
        let partial = self.stacks.values().filter(|stack| stack.is_partial);
        partial.count()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.stacks.is_empty()
    }

    pub(crate) fn get(&self, site: Option<u32>) -> Option<&Stack> {
        self.stacks.get(&site?)
    }

    pub(crate) fn place(&self, site: Option<u32>) -> String {
        self.get(site)
            .map_or_else(|| UNKNOWN.to_owned(), Stack::place)
    }

    /// All stacks with their indices, in order.
    pub(crate) fn all(&self) -> Vec<(u32, &Stack)> {
        let mut all: Vec<_> = self
            .stacks
            .iter()
            .map(|(number, stack)| (*number, stack))
            .collect();
        all.sort_unstable_by_key(|(number, _)| *number);
        all
    }

    /// Writes one record for each stack.
    pub(crate) fn write_json(&self, out: &mut Vec<u8>, t: u64) {
        for (number, stack) in self.all() {
            json::head(out, t, LineKind::Stack);
            out.put(",\"site\":");
            out.put_dec(number.into());
            out.put(",\"place\":");
            out.put_dec(stack.place as u64);
            out.put(if stack.is_partial {
                ",\"partial\":true,\"frames\":["
            } else {
                ",\"partial\":false,\"frames\":["
            });
            let mut comma = "{\"function\":";
            for frame in &stack.frames {
                out.put(comma);
                json::put_str(out, &frame.function);
                out.put(",\"module\":");
                json::put_str(out, &frame.module);
                out.put(",\"line\":");
                json::put_str(out, &frame.line);
                out.put(if frame.has_name {
                    ",\"named\":true}"
                } else {
                    ",\"named\":false}"
                });
                comma = ",{\"function\":";
            }
            out.put("]}\n");
        }
    }

    /// Writes each frame on a line, as strace does.
    pub(crate) fn write_text(&self, out: &mut Vec<u8>) {
        for (number, stack) in self.all() {
            out.put("stack ");
            out.put_dec(number.into());
            if stack.is_partial {
                out.put(" (frames may be missing)");
            }
            out.put("\n");
            for (at, frame) in stack.frames.iter().enumerate() {
                out.put(if at == stack.place { " * " } else { " > " });
                out.put(&frame.text().escape_debug().to_string().replace("\\'", "'"));
                out.put("\n");
            }
        }
    }
}

fn is_allocator(frame: &Frame, skip: &[String]) -> bool {
    let bare = frame.function.trim_start_matches('_');
    let bare = bare
        .split("::")
        .last()
        .filter(|_| bare.starts_with("alloc::alloc"))
        .unwrap_or(bare);
    ALLOCATORS.contains(&bare)
        || skip
            .iter()
            .any(|name| *name == frame.function || *name == bare)
        || frame.is_loader()
        || LIBRARIES.iter().any(|name| frame.module.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(function: &str, module: &str) -> Frame {
        let has_name = !function.contains('+');
        Frame {
            function: function.into(),
            module: module.into(),
            line: String::new(),
            has_name,
        }
    }

    fn place(frames: &[Frame], skip: &[&str]) -> String {
        let skip: Vec<String> = skip.iter().map(|name| (*name).to_owned()).collect();
        Resolved::new([(3, frames.to_vec(), false)], &skip).place(Some(3))
    }

    #[test]
    fn the_place_is_the_first_function_that_is_no_allocator() {
        let stack = [
            frame("__munmap", "libc.so.6"),
            frame("libc.so.6+0x99", "libc.so.6"),
            frame("free", "libc.so.6"),
            frame("drop_cache", "app"),
            frame("main", "app"),
        ];
        assert_eq!(place(&stack, &[]), "drop_cache (app)");
        assert_eq!(place(&stack, &["drop_cache"]), "main (app)");
        assert_eq!(place(&stack[..3], &[]), "free (libc.so.6)");
        assert_eq!(place(&[], &[]), "(not known)");
        assert_eq!(Resolved::default().place(None), "(not known)");
    }

    #[test]
    fn no_function_of_the_loader_is_a_place() {
        let loader = "ld-linux-x86-64.so.2";
        let start = [frame("mprotect", loader), frame("_dl_start", loader)];
        let opened = [
            frame("munmap", loader),
            frame("dlopen", "libc.so.6"),
            frame("plugin", "app"),
        ];
        assert_eq!(
            place(&start, &[]),
            "the loader, before the program begins (ld-linux-x86-64.so.2)"
        );
        assert_eq!(place(&opened, &[]), "plugin (app)");
    }

    #[test]
    fn a_frame_without_a_name_shows_its_address() {
        assert_eq!(frame("app+0x10", "app").text(), "app+0x10");
        let with_line = Frame {
            line: "a.c:3".into(),
            ..frame("f", "app")
        };
        assert_eq!(with_line.text(), "f (app a.c:3)");
    }
}
