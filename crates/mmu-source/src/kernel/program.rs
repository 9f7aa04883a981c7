//! The BPF program, as instructions.
//!
//! The program runs at the tracepoint `kvm:kvm_unmap_hva_range`. The tracepoint's arguments are the
//! start and the end of the range that is about to change. In C, the program of a source without a
//! broker would be:
//!
//! ```c
//! if (start == scratch) goto question;
//! if (!on) return;                                   // No range was ever armed.
//! fence();                                           // No instruction on x86-64.
//! if (dirty != MANY) {                               // Who makes this event? See `wait.rs`.
//!     me = pid_tgid >> 32 == process ? pid_tgid : MANY;
//!     if (dirty != me && !(count && *count == 0)) {  // Count zero: see below, at `hit`.
//!         old = xchg(&dirty, me);                    // A full barrier before the filter is read: `arm` needs it.
//!         if (old != QUIET && old != me) xchg(&dirty, MANY);
//!     }
//! }
//! if (!armed) return;
//! if (wide) goto hit;
//! last = end - 1;
//! for (level = 0; ; level++) {                       // The level of the event.
//!     if (level == LEVELS) goto hit;
//!     if ((last >> shift[level]) - (start >> shift[level]) < SPAN) break;
//! }
//! for (granule = start >> shift[level]; granule <= last >> shift[level]; granule++)
//!     if (sum[level][hash(granule)]) goto hit;
//! for (level = 1; level < LEVELS; level++)            // Coarser ranges. (This also tests finer ranges again, which is harmless.)
//!     if (ranges[level] && (own[level][hash(start >> shift[level])] || own[level][hash(last >> shift[level])])) goto hit;
//! return;
//! // A granule is armed if both of its counters are above zero: `hash` stands for two.
//! hit:
//! if (count && *count == 0) return;                  // Another address space, or B's own event: see `wait.rs`.
//! number = ++generation;                             // Before the page tables change and the record exists.
//! record = bpf_ringbuf_reserve(ring, 24);
//! if (!record) { lost++; return; }
//! *record = { start, end, number };
//! called = !awake && xchg(&awake, CALLED) == 0;      // One wake-up is enough: see `listen.rs`.
//! bpf_ringbuf_submit(record, called ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
//! return;
//! question:                                          // Is anything under way? See `wait.rs`.
//! number = asked;
//! fence();
//! if (count && *count == 0) {
//!     if (!process) process = pid_tgid >> 32;        // For a client of a broker: see `resolver.rs`.
//!     asker = pid_tgid >> 32 == process ? pid_tgid : 0;
//!     answered = number;
//! }
//! ```
//!
//! [`build`] unrolls the loops over levels. The loop over granules exists once, for all levels.

use super::asm::{Assembler, If, Op, PEEKED, Reg};
use super::filter::{FACTORS, LEVELS, LINE_BITS, SPAN, STARTS, shift, start_of};
use super::layout::awake;
use super::layout::dirty::{MANY, QUIET};
use super::layout::{header, private};
use super::owner;
use Reg::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10};
use std::os::fd::BorrowedFd;

/// The size of a record: start, end and number.
const RECORD: i32 = 24;
/// The helper that returns the ids of the current process and thread, 32 bits each.
const GET_CURRENT_PID_TGID: i32 = 14;

const START: Reg = R6;
const LAST: Reg = R7;
const HEADER: Reg = R8;
/// The multiplier of the first hash. The second hash is computed less often.
const FACTOR: Reg = R1;
/// The offset of the counters of the event's level.
const BASE: Reg = R9;

/// A jump target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Label {
    Question,
    /// The event is made by another process.
    Foreign,
    /// The event's mark is known.
    Mark,
    /// B's count cannot be read.
    Unknown,
    /// `dirty` is set.
    Dirty,
    /// The process is known.
    Process,
    /// Register 0 has the mark of the thread that asks.
    Asker,
    Hit,
    Count,
    NoCall,
    Submit,
    Lost,
    Out,
    /// The event is too wide for the levels before this one.
    Level(usize),
    /// The first granule of the event.
    First,
    Granule,
    /// Follows the test of a granule that is not armed. Numbered.
    Passed(usize),
    Coarser(usize),
    /// For a client of a broker: the question belongs to the client's own address space.
    Answer,
    /// For a client of a broker: the hit belongs to the client's own address space.
    Record,
    Owner(usize),
}

/// The user of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Audience {
    /// The process that loads the program.
    Own {
        /// Whether the program may read kernel memory, which lockdown can forbid.
        peek: bool,
    },
    /// A client of a broker. The program reports only changes of the client's address space: see
    /// `owner.rs`.
    Client,
}

/// The maps of the program.
#[derive(Debug, Clone, Copy)]
pub(super) struct Maps<'a> {
    pub(super) header: BorrowedFd<'a>,
    pub(super) private: BorrowedFd<'a>,
    pub(super) sum: BorrowedFd<'a>,
    pub(super) own: BorrowedFd<'a>,
    pub(super) ring: BorrowedFd<'a>,
}

type Code = Assembler<Label>;

/// Which counters are read.
#[derive(Debug, Clone, Copy)]
enum Base {
    /// The counters of the event's level, at the offset in register [`BASE`].
    Event,
    Of(usize),
}

impl Code {
    /// Jumps to `Hit` if both counters of the granule in `granule` are above zero. Overwrites
    /// registers 0 and 4.
    fn test_granule(&mut self, base: Base, table: BorrowedFd<'_>, granule: Reg) {
        let passed = Label::Passed(self.len());
        for (number, factor) in FACTORS.into_iter().enumerate() {
            self.op_reg(Op::Mov, R4, granule);
            self.op(Op::Shr, R4, 4);
            if number == 0 {
                self.op_reg(Op::Mul, R4, FACTOR);
            } else {
                self.constant(R0, factor);
                self.op_reg(Op::Mul, R4, R0);
            }
            self.op(Op::Shr, R4, 64 - LINE_BITS as i32);
            self.op(Op::Shl, R4, 5);
            self.op_reg(Op::Mov, R0, granule);
            self.op(Op::And, R0, 15);
            self.op(Op::Shl, R0, 1);
            self.op_reg(Op::Add, R4, R0);
            match base {
                Base::Event => self.op_reg(Op::Add, R4, BASE),
                Base::Of(level) => self.op(Op::Add, R4, start_of(level) as i32),
            }
            self.map_value(R0, table);
            self.op_reg(Op::Add, R0, R4);
            self.load_u16(R0, R0);
            self.jump(If::Equal, R0, 0, passed);
        }
        self.goto(Label::Hit);
        self.label(passed);
    }

    fn constant(&mut self, dst: Reg, value: u64) {
        self.wide(dst, 0, value as u32, (value >> 32) as u32);
    }

    /// `first = start >> shift; last = last >> shift` in registers 2 and 3.
    fn granules(&mut self, level: usize) {
        for (dst, src) in [(R2, START), (R3, LAST)] {
            self.op_reg(Op::Mov, dst, src);
            self.op(Op::Shr, dst, shift(level) as i32);
        }
    }
}

/// Builds the program for these maps.
pub(super) fn build(maps: Maps<'_>, audience: Audience) -> Vec<u64> {
    let mut a = Code::new();
    if audience == Audience::Client {
        owner::keep_context(&mut a);
    }
    a.load(START, R1, 0);
    a.load(LAST, R1, 8);
    a.op(Op::Sub, LAST, 1);
    a.map_value(HEADER, maps.header);
    let word = |offset: usize| offset as isize;
    a.load(R2, HEADER, word(header::SCRATCH));
    a.jump_reg(If::Equal, R2, START, Label::Question);
    // ORDER(source-wait): if this code runs at A's tracepoint, the change has already raised B's
    // count, and a full barrier (on x86-64 a locked instruction of the kernel, elsewhere this
    // fence) comes before the loads of `ON` and `dirty`. Partner: the fence in `Waits::wait`.
    // ORDER(source-forgotten): if the kernel did not find B among the notifiers, `load_count` does
    // not find B's count. Partner: the store in the resolver.
    a.fence();
    a.load(R2, HEADER, word(header::ON));
    a.jump(If::Equal, R2, 0, Label::Out);
    let peek = match audience {
        Audience::Own { peek } => peek,
        Audience::Client => true,
    };
    mark(&mut a, maps, peek);
    a.load(R2, HEADER, word(header::ARMED));
    a.jump(If::Equal, R2, 0, Label::Out);
    a.load(R2, HEADER, word(header::WIDE));
    a.jump(If::NotEqual, R2, 0, Label::Hit);
    a.constant(FACTOR, FACTORS[0]);
    for level in 0..LEVELS {
        a.granules(level);
        a.op_reg(Op::Mov, R4, R3);
        a.op_reg(Op::Sub, R4, R2);
        a.jump(If::NotLess, R4, SPAN as i32, Label::Level(level + 1));
        a.op(Op::Mov, BASE, start_of(level) as i32);
        a.goto(Label::First);
        a.label(Label::Level(level + 1));
    }
    a.goto(Label::Hit);
    a.label(Label::First);
    // The verifier would follow the loop once for each value of `BASE` that it knows. Adding a word
    // that is always zero hides the value from the verifier.
    a.load(R4, HEADER, word(header::ZERO));
    a.op_reg(Op::Add, BASE, R4);
    a.op(Op::And, BASE, STARTS as i32);
    // Register 5 bounds the loop, so that the verifier sees the bound.
    a.op(Op::Mov, R5, 0);
    a.label(Label::Granule);
    a.test_granule(Base::Event, maps.sum, R2);
    a.op(Op::Add, R2, 1);
    a.jump_reg(If::Greater, R2, R3, Label::Coarser(1));
    a.op(Op::Add, R5, 1);
    a.jump(If::Less, R5, SPAN as i32, Label::Granule);
    a.goto(Label::Hit);
    for level in 1..LEVELS {
        a.label(Label::Coarser(level));
        a.load(R0, HEADER, word(header::RANGES + 8 * level));
        a.jump(If::Equal, R0, 0, Label::Coarser(level + 1));
        a.granules(level);
        a.test_granule(Base::Of(level), maps.own, R2);
        a.jump_reg(If::Equal, R2, R3, Label::Coarser(level + 1));
        a.test_granule(Base::Of(level), maps.own, R3);
    }
    a.label(Label::Coarser(LEVELS));
    a.goto(Label::Out);
    match audience {
        Audience::Own { .. } => question(&mut a, maps, audience, Label::Question),
        Audience::Client => {
            a.label(Label::Question);
            a.label(Label::Hit);
            owner::check(
                &mut a,
                maps.private,
                (START, LAST),
                Label::Owner,
                Label::Out,
            );
            a.map_value(HEADER, maps.header);
            a.load(R2, HEADER, word(header::SCRATCH));
            a.jump_reg(If::NotEqual, R2, START, Label::Record);
            question(&mut a, maps, audience, Label::Answer);
        }
    }
    hit(
        &mut a,
        maps,
        peek,
        if audience == Audience::Client {
            Label::Record
        } else {
            Label::Hit
        },
    );
    a.finish()
}

/// Returns a hash of the client's program, which differs between versions of the program and of the
/// words that it shares.
pub(super) fn fingerprint(any: BorrowedFd<'_>) -> u64 {
    const WIDE: u64 = 0x18;
    let maps = Maps {
        header: any,
        private: any,
        sum: any,
        own: any,
        ring: any,
    };
    build(maps, Audience::Client)
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, instruction| {
            // The map in such an instruction differs each time.
            let is_map = instruction & 0xff == WIDE && instruction >> 12 & 15 != 0;
            let same = if is_map {
                instruction & 0xffff_ffff
            } else {
                instruction
            };
            (sum ^ same)
                .wrapping_mul(0x0000_0100_0000_01b3)
                .rotate_left(23)
        })
}

/// Sets `dirty` to the mark of this event. Preserves registers 6 to 8.
fn mark(a: &mut Code, maps: Maps<'_>, peek: bool) {
    let (dirty, mark) = (header::DIRTY as isize, R9);
    a.load(R2, HEADER, dirty);
    a.jump(If::Equal, R2, MANY, Label::Dirty);
    a.call(GET_CURRENT_PID_TGID);
    a.op_reg(Op::Mov, mark, R0);
    a.op(Op::Shr, R0, 32);
    a.map_value(R3, maps.private);
    a.load(R3, R3, private::PROCESS as isize);
    a.jump_reg(If::NotEqual, R0, R3, Label::Foreign);
    // ORDER(source-own): this code runs in the thread that makes the change. Partner: `is_own` in
    // `wait.rs`.
    // Only this thread sets its own mark. So if the mark is there, this thread set it in an earlier
    // event, with a full barrier.
    a.load(R2, HEADER, dirty);
    a.jump_reg(If::NotEqual, R2, mark, Label::Mark);
    a.goto(Label::Dirty);
    a.label(Label::Foreign);
    // A client of a broker must not learn which other process makes a change.
    a.op(Op::Mov, mark, MANY);
    a.label(Label::Mark);
    if peek {
        load_count(a, maps, Label::Unknown);
        a.jump(If::Equal, R0, 0, Label::Dirty);
        a.label(Label::Unknown);
    }
    a.op_reg(Op::Mov, R2, mark);
    a.exchange(HEADER, dirty, R2);
    // A mark may follow QUIET only. While a thread waits, changes that are older than its wait may
    // be under way, so the event leaves MANY in place of WAITING.
    a.jump(If::Equal, R2, QUIET, Label::Dirty);
    a.jump_reg(If::Equal, R2, mark, Label::Dirty);
    a.op(Op::Mov, R2, MANY);
    a.exchange(HEADER, dirty, R2);
    a.label(Label::Dirty);
}

/// Loads B's count into register 0, or jumps to `unknown` if the count cannot be read. Overwrites
/// registers 1 to 5.
fn load_count(a: &mut Code, maps: Maps<'_>, unknown: Label) {
    a.map_value(R3, maps.private);
    a.load(R3, R3, private::COUNT as isize);
    a.jump(If::Equal, R3, 0, unknown);
    a.peek(4);
    a.jump(If::NotEqual, R0, 0, unknown);
    a.load_u32(R0, R10, PEEKED);
}

/// Handles a question of `wait.rs`: answers it if the program can read B's count and nothing is
/// under way.
///
/// For a client of a broker, the first process that asks is the source's: `owner.rs` has let only
/// events of the client's address space pass. If a process has loaded the program itself, a
/// question may come from any process that has a page at the same address, so the resolver has
/// stored the source's process.
fn question(a: &mut Code, maps: Maps<'_>, audience: Audience, label: Label) {
    a.label(label);
    if audience != (Audience::Own { peek: false }) {
        // ORDER(source-question): load the number first, so that the count is read after the
        // question was asked. Partner: the store in `Waits::is_over`, before the question.
        a.load(R7, HEADER, header::ASKED as isize);
        a.fence();
        load_count(a, maps, Label::Out);
        a.jump(If::NotEqual, R0, 0, Label::Out);
        a.call(GET_CURRENT_PID_TGID);
        a.op_reg(Op::Mov, R1, R0);
        a.op(Op::Shr, R1, 32);
        a.map_value(R2, maps.private);
        a.load(R3, R2, private::PROCESS as isize);
        if audience == Audience::Client {
            a.jump(If::NotEqual, R3, 0, Label::Process);
            a.store(R2, private::PROCESS as isize, R1);
            a.op_reg(Op::Mov, R3, R1);
            a.label(Label::Process);
        }
        a.jump_reg(If::Equal, R1, R3, Label::Asker);
        a.op(Op::Mov, R0, 0);
        a.label(Label::Asker);
        a.store(HEADER, header::ASKER as isize, R0);
        // ORDER(source-asker): the fence orders the store of the asker before that of the answer,
        // because the answer may come from another process, on another processor. Partner: the load
        // of the answer in `Waits::is_over`.
        a.fence();
        a.store(HEADER, header::ANSWERED as isize, R7);
    }
    a.goto(Label::Out);
}

/// The end of the program: counts and records the event, unless B's count is zero.
fn hit(a: &mut Code, maps: Maps<'_>, peek: bool, label: Label) {
    const RINGBUF_RESERVE: i32 = 131;
    const RINGBUF_SUBMIT: i32 = 132;
    const NO_WAKEUP: i32 = 1;
    const FORCE_WAKEUP: i32 = 2;
    a.label(label);
    if peek {
        load_count(a, maps, Label::Count);
        a.jump(If::NotEqual, R0, 0, Label::Count);
        a.load(R0, HEADER, header::IGNORED as isize);
        a.op(Op::Add, R0, 1);
        a.store(HEADER, header::IGNORED as isize, R0);
        a.goto(Label::Out);
    }
    a.label(Label::Count);
    a.op(Op::Mov, R9, 1);
    a.atomic_add(HEADER, header::GENERATION as isize, R9, true);
    a.op(Op::Add, R9, 1);
    a.map(R1, maps.ring);
    a.op(Op::Mov, R2, RECORD);
    a.op(Op::Mov, R3, 0);
    a.call(RINGBUF_RESERVE);
    a.jump(If::Equal, R0, 0, Label::Lost);
    a.store(R0, 0, START);
    a.op(Op::Add, LAST, 1);
    a.store(R0, 8, LAST);
    a.store(R0, 16, R9);
    a.op_reg(Op::Mov, R1, R0);
    // ORDER(source-awake): the generation was counted above, which is a full barrier. Partner: the
    // fence in `wants_a_call`.
    let awake = header::AWAKE as isize;
    a.load(R2, HEADER, awake);
    a.jump(If::NotEqual, R2, 0, Label::NoCall);
    a.op(Op::Mov, R2, awake::CALLED);
    a.exchange(HEADER, awake, R2);
    a.jump(If::NotEqual, R2, 0, Label::NoCall);
    a.op(Op::Mov, R2, FORCE_WAKEUP);
    a.goto(Label::Submit);
    a.label(Label::NoCall);
    a.op(Op::Mov, R2, NO_WAKEUP);
    a.label(Label::Submit);
    a.call(RINGBUF_SUBMIT);
    a.label(Label::Out);
    a.op(Op::Mov, R0, 0);
    a.exit();
    a.label(Label::Lost);
    a.op(Op::Mov, R1, 1);
    a.atomic_add(HEADER, header::LOST as isize, R1, false);
    a.goto(Label::Out);
}
