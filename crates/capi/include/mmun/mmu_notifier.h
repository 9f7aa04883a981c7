/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * MMU notifiers for userspace, by the names and shapes of the kernel's own (Linux 6.12).
 *
 * A driver's notifier code compiles with its includes changed: `struct mmu_notifier` is a field of
 * the driver's object and found again by container_of(), a `struct mmu_notifier_ops` is the table
 * and, by its address, the key.
 *
 * RULES FOR EVERY FUNCTION
 *
 * Threads    Any thread may call anything, at any time; what belongs to a thread says so.
 * Callbacks  Run in the thread that changes the address space, in parallel with themselves and with
 *            everything else, without any lock of this library. From a callback a driver may get
 *            what exists, put, and open further invalidations; it must not wait for callbacks. What
 *            would wait for itself returns -EDEADLK, or ends the process with a message where the
 *            function returns nothing: in the kernel that is lockdep's splat and the hang that
 *            follows. A callback that is called by an event source of this process may stand in the
 *            middle of free(): then it must not allocate, nor take a lock that a thread may hold
 *            while it allocates.
 * fork       In the child an address space of the parent has no callbacks, refuses subscribers
 *            (-ESRCH), and what is put, removed or dropped of it is left as it is, without a
 *            callback. The child makes its own. Every function may be called.
 * Errors     Negative error numbers, or ERR_PTR of them. A null pointer is -EINVAL where there is a
 *            result, and else ends the process with a message. Mistakes that the kernel answers
 *            with WARN are said on stderr, once for each place.
 * C++        An exception that leaves a callback ends the process; so does pthread_cancel() of a
 *            thread in a callback, or that waits in a function of this header.
 *
 * Differences from the kernel are said at each function. For all of them: nothing is interrupted by
 * signals (no -EINTR), there is no -ENOMEM but from alloc_notifier, and one address space never
 * waits for callbacks of another.
 */
#ifndef MMUN_MMU_NOTIFIER_H
#define MMUN_MMU_NOTIFIER_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What the kernel has elsewhere, for drivers that use it. */

#ifndef container_of
#define container_of(pointer, type, member) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))
#endif

#ifndef MAX_ERRNO
#define MAX_ERRNO 4095

/* Returns an error as a pointer; PTR_ERR returns the error again, IS_ERR tells it from an
 * object. */
static inline void *ERR_PTR(long error)
{
	return (void *)error;
}

static inline long PTR_ERR(const void *pointer)
{
	return (long)pointer;
}

static inline bool IS_ERR(const void *pointer)
{
	return (unsigned long)pointer >= (unsigned long)-MAX_ERRNO;
}

static inline bool IS_ERR_OR_NULL(const void *pointer)
{
	return !pointer || IS_ERR(pointer);
}
#endif

/* ------------------------------------------------------------------------------------------------
 * Address spaces
 * ---------------------------------------------------------------------------------------------- */

/*
 * An address space: an opaque handle, which is counted. `mm_count` keeps the memory of the object,
 * `mm_users` the address space. It need not be this process's own: an emulator or a tracer makes
 * one for each guest.
 */
struct mm_struct;

/* Returns this process's own, which the event sources of this process feed. It is not counted and
 * never ends. In the child of a fork it is another one. Allocates at first use. */
struct mm_struct *mmun_current_mm(void);

/* Makes one with one user, which the caller gives back with mmput(). The caller is its event source
 * (below). */
struct mm_struct *mmun_mm_new(void);

/* Takes one more handle, of a caller that has one; mmdrop() gives it back. The last mmdrop() waits
 * for queued frees of this address space, if any are left. */
#define mmgrab mmun_mmgrab
#define mmdrop mmun_mmdrop
void mmgrab(struct mm_struct *mm);
void mmdrop(struct mm_struct *mm);

/* Takes one more user, of a caller that has one; mmput() gives it back. The last mmput() is exit:
 * it calls release of every subscriber, delists them all and waits for their callbacks, so it may
 * sleep; in a callback it does not wait. */
#define mmget mmun_mmget
#define mmput mmun_mmput
void mmget(struct mm_struct *mm);
void mmput(struct mm_struct *mm);

/* Takes a user, of a caller that has a handle; false if the address space has ended, or is the
 * parent's of this process. */
#define mmget_not_zero mmun_mmget_not_zero
bool mmget_not_zero(struct mm_struct *mm);

/* Takes and gives back the write lock of an address space, which registrars hold; in one and the
 * same thread, which can hold those of four at once. Event sources do not take it (the kernel's
 * do). Ends the process inside an invalidation of the same address space, in free_notifier, and if
 * the thread holds it already. */
#define mmap_write_lock mmun_mmap_write_lock
#define mmap_write_unlock mmun_mmap_write_unlock
void mmap_write_lock(struct mm_struct *mm);
void mmap_write_unlock(struct mm_struct *mm);

/* ------------------------------------------------------------------------------------------------
 * What callbacks are told
 * ---------------------------------------------------------------------------------------------- */

/* Why a range changes. A hint: a driver that lets go of everything on every event is correct. */
enum mmu_notifier_event {
	MMU_NOTIFY_UNMAP = 0,       /* The mapping goes away or moves; only after it may the mapping be gone. */
	MMU_NOTIFY_CLEAR,           /* The pages go, the mapping stays. */
	MMU_NOTIFY_PROTECTION_VMA,  /* The protection of the mapping changes. */
	MMU_NOTIFY_PROTECTION_PAGE, /* That of single pages does. */
	MMU_NOTIFY_SOFT_DIRTY,      /* Pages are write-protected to see who writes. */
	MMU_NOTIFY_RELEASE,         /* The address space ends; intervals alone hear it, and exit alone says it. */
	MMU_NOTIFY_MIGRATE,         /* The pages move; the range has an owner. */
	MMU_NOTIFY_EXCLUSIVE        /* A device takes the pages for itself; the range has an owner. */
};

#define MMU_NOTIFIER_RANGE_BLOCKABLE (1u << 0)

/*
 * One invalidation of the bytes from `start` up to and without `end`.
 *
 * As a source gives it: made by mmu_notifier_range_init(), started and ended once. Bounds that are
 * no multiples of 4096 are rounded outwards, and callbacks see them rounded (the kernel's sources
 * give whole pages). A range without bytes calls no callback (in the kernel it calls them, and
 * with [0, 0) every interval). A range up to ULONG_MAX is one that reaches the last address.
 *
 * As a callback gets it: constant, gone when the callback returns; what has no mmun_ in its name may
 * be copied.
 */
struct mmu_notifier_range {
	struct mm_struct *mm;
	unsigned long start;
	unsigned long end;
	unsigned int flags;
	enum mmu_notifier_event event;
	void *owner; /* NULL unless the event has one. */
	size_t mmun_state;
	size_t mmun_private[17];
};

static inline void mmu_notifier_range_init_owner(struct mmu_notifier_range *range, enum mmu_notifier_event event,
						 unsigned int flags, struct mm_struct *mm, unsigned long start,
						 unsigned long end, void *owner)
{
	range->mm = mm;
	range->start = start;
	range->end = end;
	range->flags = flags;
	range->event = event;
	range->owner = owner;
	range->mmun_state = 0;
}

static inline void mmu_notifier_range_init(struct mmu_notifier_range *range, enum mmu_notifier_event event,
					   unsigned int flags, struct mm_struct *mm, unsigned long start,
					   unsigned long end)
{
	mmu_notifier_range_init_owner(range, event, flags, mm, start, end, NULL);
}

/* Tells whether a callback for this range may sleep. */
static inline bool mmu_notifier_range_blockable(const struct mmu_notifier_range *range)
{
	return (range->flags & MMU_NOTIFIER_RANGE_BLOCKABLE) != 0;
}

/* ------------------------------------------------------------------------------------------------
 * Subscribers
 * ---------------------------------------------------------------------------------------------- */

struct mmu_notifier;

/* The table of a driver; each callback may be NULL. The table must outlive every notifier of it,
 * until it is freed. */
struct mmu_notifier_ops {
	/* Lets go of the whole address space, which ends. When it returns nothing may reach the
	 * address space through this notifier. Called once by exit; by mmu_notifier_unregister()
	 * too, so perhaps twice and in parallel. May sleep. */
	void (*release)(struct mmu_notifier *subscription, struct mm_struct *mm);

	/* Clears the accessed marks of a range and flushes; tells whether any was set. May
	 * sleep. */
	int (*clear_flush_young)(struct mmu_notifier *subscription, struct mm_struct *mm, unsigned long start,
				 unsigned long end);
	/* The same; need not flush. */
	int (*clear_young)(struct mmu_notifier *subscription, struct mm_struct *mm, unsigned long start,
			   unsigned long end);
	/* Tells whether the accessed mark of a page is set. */
	int (*test_young)(struct mmu_notifier *subscription, struct mm_struct *mm, unsigned long address);

	/* Lets go of a range that is about to change, and keeps off it until the end. Returns 0;
	 * -EAGAIN, if the range is not blockable and it would have to sleep. Another error is taken
	 * for that one, with a warning (the kernel passes it on). */
	int (*invalidate_range_start)(struct mmu_notifier *subscription, const struct mmu_notifier_range *range);
	/* The change is over. Comes to exactly those whose start returned 0, less those put or
	 * unregistered in between. (In the kernel the one that refused gets an end as well, and a
	 * warning.) */
	void (*invalidate_range_end)(struct mmu_notifier *subscription, const struct mmu_notifier_range *range);

	/* Flushes a TLB that walks the page table by itself. Must not sleep. A table with it has no
	 * start and no end. */
	void (*arch_invalidate_secondary_tlbs)(struct mmu_notifier *subscription, struct mm_struct *mm,
					       unsigned long start, unsigned long end);

	/* Makes the notifier of an address space that has none; complete, because callbacks may
	 * come before mmu_notifier_get() returns. Runs under the write lock. Returns an ERR_PTR if
	 * it cannot; NULL is taken for -ENOMEM (the kernel crashes). */
	struct mmu_notifier *(*alloc_notifier)(struct mm_struct *mm);
	/* Frees a notifier after the last put and a grace period, when no callback can be running
	 * in it, on a thread of the library; must not wait for anything. Also called at once, under
	 * the write lock, for what alloc_notifier made and could not be registered. */
	void (*free_notifier)(struct mmu_notifier *subscription);
};

/* A subscriber, in the driver's object. `ops` and `mm` may be read while it is registered. */
struct mmu_notifier {
	const struct mmu_notifier_ops *ops;
	struct mm_struct *mm;
	size_t mmun_private[14];
};

/*
 * Returns the notifier of `ops` on `mm`, which needs a user, and counts one more user of it; makes
 * it if there is none. When it returns, every invalidation that does not call it has ended. Finds
 * also what was registered with the same `ops`, the newest first. What exists is found without a
 * lock, in callbacks, too (the kernel always takes the lock); for a new one it sleeps.
 *
 * ERR_PTR of: what alloc_notifier said; -EOVERFLOW if it has as many users as can be counted;
 * -EDEADLK if it has to be made and this thread is inside an invalidation or callback of `mm`, in
 * free_notifier, or holds the write lock; -ESRCH if the address space has ended (the kernel dies)
 * or is the parent's of a fork; -EINVAL for no table or no alloc_notifier, for a table of both
 * kinds, and from _locked without the lock.
 */
#define mmu_notifier_get mmun_get
#define mmu_notifier_get_locked mmun_get_locked
struct mmu_notifier *mmu_notifier_get(const struct mmu_notifier_ops *ops, struct mm_struct *mm);
struct mmu_notifier *mmu_notifier_get_locked(const struct mmu_notifier_ops *ops, struct mm_struct *mm);

/*
 * Gives a user back. The last one delists the notifier: an invalidation that starts afterwards does
 * not call it, one under way calls it no more once it comes to it, and free_notifier follows after
 * a grace period. Calls no release. Never sleeps; may be called in every callback. One put too
 * many, before the notifier is freed, is a warning.
 */
#define mmu_notifier_put mmun_put
void mmu_notifier_put(struct mmu_notifier *subscription);

/*
 * Registers a notifier of the driver's own, whose `ops` is set; __mmu_notifier_register() under the
 * write lock. To be given up with one mmu_notifier_unregister(), or with mmu_notifier_put() if the
 * table has free_notifier. When it returns, every invalidation that does not call the notifier has
 * ended. 0 or the errors of mmu_notifier_get(); after an error the notifier is as it was.
 */
#define mmu_notifier_register mmun_register
#define __mmu_notifier_register mmun_register_locked
int mmu_notifier_register(struct mmu_notifier *subscription, struct mm_struct *mm);
int __mmu_notifier_register(struct mmu_notifier *subscription, struct mm_struct *mm);

/*
 * Calls release, unless exit has, delists the notifier, and waits until no callback runs in it.
 * Then its memory is the driver's again. Users that got it by mmu_notifier_get() lose it. Inside an
 * invalidation or callback of `mm` and in free_notifier it ends the process.
 */
#define mmu_notifier_unregister mmun_unregister
void mmu_notifier_unregister(struct mmu_notifier *subscription, struct mm_struct *mm);

/*
 * Waits until every notifier whose last put came before the call has been freed, whichever thread
 * put it, so that code of the driver can be unloaded. (The kernel's says so and waits for a grace
 * period only; this one waits for no callback if nothing was put.) Inside an invalidation, a
 * callback or free_notifier it ends the process.
 */
#define mmu_notifier_synchronize mmun_synchronize
void mmu_notifier_synchronize(void);

/* Tells whether an invalidation would call a subscriber. (In the kernel it stays true after the
 * last one has gone.) */
#define mm_has_notifiers mmun_mm_has_notifiers
bool mm_has_notifiers(struct mm_struct *mm);

/* ------------------------------------------------------------------------------------------------
 * Event sources: the code that changes an address space
 * ---------------------------------------------------------------------------------------------- */

/*
 * Tells subscribers that the range is about to change, and waits until they have let go; _end()
 * says that it has. Both in one thread, the range left where it is in between, and not copied. They
 * nest. In between no subscriber can finish subscribing, and what is put is not freed. Callbacks
 * come newest subscriber first, intervals before them in the order of their addresses. Starting
 * what is started ends the process. Ending what is not started does nothing.
 */
#define mmu_notifier_invalidate_range_start mmun_invalidate_range_start
#define mmu_notifier_invalidate_range_end mmun_invalidate_range_end
void mmu_notifier_invalidate_range_start(struct mmu_notifier_range *range);
void mmu_notifier_invalidate_range_end(struct mmu_notifier_range *range);

/* The same where subscribers may not sleep. -EAGAIN if a subscriber would have to: then those which
 * had accepted have got their end, and none is owed. All subscribers are asked; intervals up to the
 * one that refuses, and then no subscriber. */
#define mmu_notifier_invalidate_range_start_nonblock mmun_invalidate_range_start_nonblock
int mmu_notifier_invalidate_range_start_nonblock(struct mmu_notifier_range *range);

/* Calls arch_invalidate_secondary_tlbs of all. */
#define mmu_notifier_arch_invalidate_secondary_tlbs mmun_arch_invalidate_secondary_tlbs
void mmu_notifier_arch_invalidate_secondary_tlbs(struct mm_struct *mm, unsigned long start, unsigned long end);

/* Ask all subscribers and tell whether one said yes; test_young asks no further than the first. A
 * yes is 1. */
#define mmu_notifier_clear_flush_young mmun_clear_flush_young
#define mmu_notifier_clear_young mmun_clear_young
#define mmu_notifier_test_young mmun_test_young
int mmu_notifier_clear_flush_young(struct mm_struct *mm, unsigned long start, unsigned long end);
int mmu_notifier_clear_young(struct mm_struct *mm, unsigned long start, unsigned long end);
int mmu_notifier_test_young(struct mm_struct *mm, unsigned long address);

/* ------------------------------------------------------------------------------------------------
 * Intervals: many ranges, with the collision-retry protocol
 * ---------------------------------------------------------------------------------------------- */

struct mmu_interval_notifier;

struct mmu_interval_notifier_ops {
	/* Takes the driver's lock, calls mmu_interval_set_seq() with `cur_seq`, always, and lets go
	 * of the range. Returns true; false if the range is not blockable and it would have to
	 * sleep. After exit it comes once more, with MMU_NOTIFY_RELEASE and the whole address
	 * space. */
	bool (*invalidate)(struct mmu_interval_notifier *interval_sub, const struct mmu_notifier_range *range,
			   unsigned long cur_seq);
};

/* An interval, in the driver's object. What has a name may be read while it is inserted. */
struct mmu_interval_notifier {
	struct {
		unsigned long start;
		unsigned long last; /* Inclusive. */
	} interval_tree;
	const struct mmu_interval_notifier_ops *ops;
	struct mm_struct *mm;
	size_t mmun_private[14];
};

/*
 * Inserts an interval of `length` bytes; _locked under the write lock. It may not be in the tree
 * yet when this returns: begin with mmu_interval_read_begin(). The first insert on an address space
 * sleeps until the open invalidations have ended. 0; -EOVERFLOW for no bytes or too many; -EINVAL
 * if the address space has ended, and without the lock; -EDEADLK if it would wait for this thread.
 */
#define mmu_interval_notifier_insert mmun_interval_insert
#define mmu_interval_notifier_insert_locked mmun_interval_insert_locked
int mmu_interval_notifier_insert(struct mmu_interval_notifier *interval_sub, struct mm_struct *mm, unsigned long start,
				 unsigned long length, const struct mmu_interval_notifier_ops *ops);
int mmu_interval_notifier_insert_locked(struct mmu_interval_notifier *interval_sub, struct mm_struct *mm,
					unsigned long start, unsigned long length,
					const struct mmu_interval_notifier_ops *ops);

/* Removes an interval and waits until no callback of it runs; its memory is the driver's again.
 * Where that would wait for this very thread, it ends the process. */
#define mmu_interval_notifier_remove mmun_interval_remove
void mmu_interval_notifier_remove(struct mmu_interval_notifier *interval_sub);

/*
 * The sequence that a reader takes before it looks pages up. It sleeps while an invalidation that
 * met the interval runs. Inside an invalidation of this very thread, where that would hang, it
 * returns 0, which never fits; so it does in the child of a fork.
 */
#define mmu_interval_read_begin mmun_interval_read_begin
unsigned long mmu_interval_read_begin(struct mmu_interval_notifier *interval_sub);

/* Tells whether the range was invalidated since: under the driver's lock, reliably. _check_retry()
 * is the same without the lock: a true is reliable then, a false is not. */
#define mmu_interval_read_retry mmun_interval_read_retry
#define mmu_interval_check_retry mmun_interval_read_retry
bool mmu_interval_read_retry(struct mmu_interval_notifier *interval_sub, unsigned long seq);

/* For `invalidate` alone, under the driver's lock. */
#define mmu_interval_set_seq mmun_interval_set_seq
void mmu_interval_set_seq(struct mmu_interval_notifier *interval_sub, unsigned long cur_seq);

#ifdef __cplusplus
}
#endif

#endif
