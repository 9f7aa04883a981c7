//! Tests with malformed files: for any bytes, reading terminates and takes little memory.
//!
//! `tiny.elf` has symbols, unwind tables, lines and an inlined function:
//!
//! ```text
//! gcc -g -O1 -shared -fPIC -nostdlib -Wl,-z,noseparate-code,-z,norelro,--build-id=sha1 tiny.c
//! static inline __attribute__((always_inline)) int inner(int value) { return value * 3 + 1; }
//! int middle(int value, int (*call)(int)) { int sum = 0; for (...) sum += call(inner(i)); ... }
//! int outer(int value, int (*call)(int)) { return middle(value, call) + inner(value); }
//! ```

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

#[cfg(target_arch = "aarch64")]
use framehop::aarch64::{
    CacheAarch64 as Cache, UnwindRegsAarch64 as Registers, UnwinderAarch64 as Unwinder,
};
#[cfg(target_arch = "x86_64")]
use framehop::x86_64::{
    CacheX86_64 as Cache, UnwindRegsX86_64 as Registers, UnwinderX86_64 as Unwinder,
};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use framehop::{ExplicitModuleSectionInfo, Module, Unwinder as _};

use super::guard::guarded;
use super::image::{Budget, Content, Image, Images};
use super::{Address, symbols};

const TINY: &[u8] = include_bytes!("corrupt/tiny.elf");

/// The count of corrupted files that are read; `MMUN_ROUNDS` overrides it.
const ROUNDS: u64 = 3_000;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Corrupts a few bytes: random bytes, or words that are too large or too small.
fn corrupt(random: &mut Random) -> Vec<u8> {
    let mut bytes = TINY.to_vec();
    if random.below(8) == 0 {
        bytes.truncate(random.below(bytes.len()));
    }
    for _ in 0..=random.below(6) {
        let word = match random.below(6) {
            0 => u64::MAX,
            1 => 0,
            2 => 1 << 63,
            3 => random.next() % bytes.len().max(1) as u64,
            _ => random.next(),
        };
        let size = 1 << random.below(4);
        // Prefer the headers at the begin and the end, which have the offsets of all other parts.
        let at = match random.below(4) {
            0 => random.below(0x270),
            1 => TINY.len() - 1 - random.below(0x680),
            _ => random.below(TINY.len()),
        };
        for (byte, new) in bytes.iter_mut().skip(at).zip(&word.to_le_bytes()[..size]) {
            *byte = *new;
        }
    }
    bytes
}

/// Reads a file as a trace does, and returns the names found.
fn read(bytes: Vec<u8>, random: &mut Random) -> Vec<String> {
    let mut budget = Budget::default();
    let content = Content::Memory(bytes.into());
    let image = guarded(|| Image::new("/bin/tiny".into(), content, &mut budget)).flatten();
    let Some(image) = image else {
        return Vec::new();
    };
    guarded(|| unwind(&image, random));
    let addresses: Vec<Address> = (0x260..0x2e0).map(|at| Address { image: 0, at }).collect();
    let frames = guarded(|| symbols::of_file(&image, &addresses)).unwrap_or_default();
    frames
        .into_iter()
        .flatten()
        .map(|frame| frame.text())
        .collect()
}

/// Runs under a fuzzer: reads a file of these bytes. A crash by a full stack is no finding: a file
/// can make the readers recurse that deep, so a trace names the frames in a child process.
#[cfg(fuzzing)]
pub(crate) fn fuzz(bytes: &[u8]) {
    read(bytes.to_vec(), &mut Random(0x9e37_79b9_7f4a_7c15));
}

/// Unwinds with the file's tables, for any processor.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn unwind(image: &Image, random: &mut Random) {
    let sections = image.sections.clone();
    let span = |at: u64, size: usize| at..at.saturating_add(size as u64);
    let info = ExplicitModuleSectionInfo {
        text_svma: sections.text.map(|(at, size)| at..at.saturating_add(size)),
        eh_frame_svma: sections
            .eh_frame
            .as_ref()
            .map(|(at, data)| span(*at, data.len())),
        eh_frame: sections.eh_frame.map(|(_, data)| data),
        eh_frame_hdr_svma: sections
            .eh_frame_hdr
            .as_ref()
            .map(|(at, data)| span(*at, data.len())),
        eh_frame_hdr: sections.eh_frame_hdr.map(|(_, data)| data),
        ..ExplicitModuleSectionInfo::default()
    };
    let bias = 0x7f00_0000_0000;
    let mut unwinder = Unwinder::new();
    unwinder.add_module(Module::new(String::new(), bias..bias + 0x2000, bias, info));
    let mut cache = Cache::new();
    for ip in [0x270, 0x27a, 0x2a4, 0x2c4] {
        let stack = random.next();
        // Half of the words lead back into the code.
        let mut word = |address: u64| {
            let offset = address.wrapping_sub(stack);
            if offset > 1 << 16 {
                Err(())
            } else {
                Ok(if offset & 8 == 0 {
                    bias + 0x270 + offset % 0x55
                } else {
                    stack + offset
                })
            }
        };
        let registers = Registers::new(bias + ip, stack, stack.wrapping_add(64));
        let mut iter = unwinder.iter_frames(bias + ip, registers, &mut cache, &mut word);
        let mut frames = 0;
        while let Ok(Some(_)) = iter.next() {
            frames += 1;
            if frames == 256 {
                break;
            }
        }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn unwind(_: &Image, _: &mut Random) {}

/// An ELF file whose function at 0x1000 has `depth` inlined functions, each nested in the previous
/// one.
fn nested(depth: usize) -> Vec<u8> {
    const ABBREV: &[u8] = &[
        // A unit and a function, each with an address and a size; an inlined function without both.
        1, 0x11, 1, 0x11, 1, 0x12, 7, 0, 0, 2, 0x2e, 1, 0x11, 1, 0x12, 7, 0, 0, 3, 0x1d, 1, 0, 0, 0,
    ];
    let mut info = vec![4, 0, 0, 0, 0, 0, 8];
    for code in [1, 2] {
        info.push(code);
        info.extend(0x1000_u64.to_le_bytes());
        info.extend(0x100_u64.to_le_bytes());
    }
    info.extend(std::iter::repeat_n(3, depth));
    info.extend(std::iter::repeat_n(0, depth + 2));
    info.splice(0..0, (info.len() as u32).to_le_bytes());
    let names = b"\0.shstrtab\0.debug_abbrev\0.debug_info\0.debug_line\0";
    let parts = [
        (1, 3, &names[..]),
        (11, 1, ABBREV),
        (25, 1, &info),
        (37, 1, &[]),
    ];
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([3, 0, 62, 0, 1, 0, 0, 0]);
    file.resize(64, 0);
    let mut headers = vec![0; 64];
    for (name, kind, data) in parts {
        let mut words = [0_u64; 8];
        words[0] = name | kind << 32;
        words[3] = file.len() as u64;
        words[4] = data.len() as u64;
        words[6] = 1;
        headers.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        file.extend_from_slice(data);
    }
    let at = file.len() as u64;
    file[40..48].copy_from_slice(&at.to_le_bytes());
    for (at, half) in [(52, 64_u16), (54, 56), (58, 64), (60, 5), (62, 1)] {
        file[at..at + 2].copy_from_slice(&half.to_le_bytes());
    }
    file.extend(headers);
    file
}

#[test]
fn a_file_that_overflows_the_stack_of_its_readers_costs_its_own_names_only() {
    let image = |path: &str, bytes: Vec<u8>| {
        let content = Content::Memory(bytes.into());
        Image::new(path.into(), content, &mut Budget::default()).expect("an ELF file")
    };
    let mut images = Images::default();
    images.list = vec![
        image("/bin/first", TINY.to_vec()),
        image("/bin/nested", nested(1 << 20)),
        image("/bin/last", TINY.to_vec()),
    ];
    let wanted = [(0, 0x270), (1, 0x1010), (2, 0x270)].map(|(image, at)| Address { image, at });
    let named = symbols::name(&images, &wanted);
    let names = wanted.map(|address| named[&address].last().expect("a frame").text());
    assert_eq!(
        names,
        [
            "middle (first tiny.c:2)",
            "nested+0x1010",
            "middle (last tiny.c:2)"
        ]
    );
}

#[test]
fn a_whole_file_is_read() {
    let names = read(TINY.to_vec(), &mut Random(1));
    for name in [
        "middle (tiny tiny.c:2)",
        "inner (tiny tiny.c:1)",
        "outer (tiny tiny.c:3)",
    ] {
        assert!(names.iter().any(|found| found == name), "{names:?}");
    }
}

#[test]
fn a_corrupt_file_is_read_to_an_end() {
    let rounds = std::env::var("MMUN_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(ROUNDS);
    let (sender, receiver) = channel();
    let reader = std::thread::spawn(move || {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for round in 0..rounds {
            // The last received round is the round that hangs.
            if sender.send(round).is_err() {
                return;
            }
            read(corrupt(&mut random), &mut random);
        }
    });
    let mut last = 0;
    loop {
        match receiver.recv_timeout(Duration::from_secs(120)) {
            Ok(round) => last = round,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => panic!("round {last} does not end"),
        }
    }
    assert!(reader.join().is_ok(), "round {last} panicked");
    let peak = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = peak.lines().find_map(|line| {
        line.strip_prefix("VmHWM:")?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    });
    assert!(peak.is_none_or(|kib: u64| kib < 1 << 20), "{peak:?} KiB");
}
