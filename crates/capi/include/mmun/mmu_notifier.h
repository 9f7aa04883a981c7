/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * MMU notifiers for userspace, by the names and shapes of the kernel's own (Linux 6.12).
 *
 * A driver's notifier code compiles after its includes are changed. `struct mmu_notifier` is a
 * field of the driver's object, which the driver finds with container_of(). A `struct
 * mmu_notifier_ops` is the driver's table of callbacks. mmu_notifier_get() identifies the driver by
 * the address of that table.
 *
 * RULES FOR EVERY FUNCTION
 *
 * Threads    Any thread may call any function at any time, unless the function says otherwise.
 * Callbacks  Callbacks run in the thread that changes the address space. The same callback may run
 *            in several threads at once. The library holds no lock of its own meanwhile. A callback
 *            may get a notifier that exists, put a notifier, and open further invalidations. A
 *            callback must not wait for callbacks. A function that would wait for its own thread
 *            returns -EDEADLK, or ends the process with a message if it returns nothing. (In the
 *            kernel, lockdep warns and the thread hangs.) An event source of this process may run a
 *            callback in the middle of free(). So a callback on mmun_current_mm() must not
 *            allocate, and must not take a lock that a thread may hold while it allocates.
 * fork       In the child, an address space of the parent runs no callbacks and refuses subscribers
 *            (-ESRCH) and intervals (-EINVAL). A put, remove or drop of a parent's object does not
 *            free the object and calls no callback. The child can make address spaces of its own,
 *            and may call every function with them.
 * Errors     Functions return negative error numbers, or ERR_PTR of them. For a null pointer, a
 *            function with a result returns -EINVAL; a function without a result ends the process
 *            with a message. If the kernel would WARN about a mistake, the library prints a line on
 *            stderr, once for each kind of mistake.
 * C++        An exception that leaves a callback ends the process. So does pthread_cancel() of a
 *            thread that is in a callback or waits in a function of this header.
 *
 * Each function lists how it differs from the kernel's. Three differences concern all functions: a
 * signal interrupts no function (no -EINTR), -ENOMEM comes only from alloc_notifier, and one
 * address space never waits for callbacks of another.
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

/* Names that the kernel defines in other headers, for drivers that use them. */

#ifndef container_of
#define container_of(pointer, type, member) ((type *)(void *)((char *)(pointer) - offsetof(type, member)))
#endif

#ifndef MAX_ERRNO
#define MAX_ERRNO 4095

/* ERR_PTR turns an error number into a pointer, and PTR_ERR turns the pointer back. IS_ERR tells
 * such a pointer from an object. */
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
 * An address space: an opaque, counted handle. `mm_count` keeps the memory of the object,
 * `mm_users` keeps the address space alive. The address space need not be this process's own: an
 * emulator or a tracer makes one for each guest.
 */
struct mm_struct;

/* Returns this process's own address space, to which the event sources of this process report. The
 * handle is not counted and stays valid until the process ends. In the child of a fork the function
 * returns a different address space. The first call of a process allocates. */
struct mm_struct *mmun_current_mm(void);

/* Makes an address space with one user, which the caller drops with mmput(). The caller is the
 * event source of this address space (see below). */
struct mm_struct *mmun_mm_new(void);

/* mmgrab() takes one more handle; the caller must already have a handle. mmdrop() drops a handle.
 * The last mmdrop() waits for the queued frees of this address space. */
#define mmgrab mmun_mmgrab
#define mmdrop mmun_mmdrop
void mmgrab(struct mm_struct *mm);
void mmdrop(struct mm_struct *mm);

/* mmget() takes one more user; the caller must already have a user. mmput() drops a user. The last
 * mmput() is the *exit* of the address space: it calls release of every subscriber, delists all
 * subscribers and waits until their callbacks have ended. So exit may sleep. In a callback, exit
 * does not wait. */
#define mmget mmun_mmget
#define mmput mmun_mmput
void mmget(struct mm_struct *mm);
void mmput(struct mm_struct *mm);

/* Takes a user for a caller that has a handle. Returns false if the address space has ended, or
 * belongs to the parent process. */
#define mmget_not_zero mmun_mmget_not_zero
bool mmget_not_zero(struct mm_struct *mm);

/* mmap_write_lock() takes the write lock of an address space, mmap_write_unlock() releases it. The
 * functions that register a notifier hold this lock. The thread that took the lock must release it.
 * A thread can hold the locks of four address spaces at once. Event sources do not take the lock
 * (the kernel's do). mmap_write_lock() ends the process if this thread is inside an invalidation of
 * the same address space, is in free_notifier, or holds the lock already. */
#define mmap_write_lock mmun_mmap_write_lock
#define mmap_write_unlock mmun_mmap_write_unlock
void mmap_write_lock(struct mm_struct *mm);
void mmap_write_unlock(struct mm_struct *mm);

/* ------------------------------------------------------------------------------------------------
 * The arguments of callbacks
 * ---------------------------------------------------------------------------------------------- */

/* Why a range changes. The event is only a hint: a driver is correct if it ignores the event and
 * drops every entry of the range. */
enum mmu_notifier_event {
	MMU_NOTIFY_UNMAP = 0,       /* The mapping is removed or moved; after other events it is still there. */
	MMU_NOTIFY_CLEAR,           /* The pages are discarded, the mapping stays. */
	MMU_NOTIFY_PROTECTION_VMA,  /* The protection of the mapping changes. */
	MMU_NOTIFY_PROTECTION_PAGE, /* The protection of single pages changes. */
	MMU_NOTIFY_SOFT_DIRTY,      /* Pages are write-protected to track writes. */
	MMU_NOTIFY_RELEASE,         /* The address space ends; only exit sends it, and only to intervals. */
	MMU_NOTIFY_MIGRATE,         /* The pages move; the range has an owner. */
	MMU_NOTIFY_EXCLUSIVE        /* A device takes the pages for itself; the range has an owner. */
};

#define MMU_NOTIFIER_RANGE_BLOCKABLE (1u << 0)

/*
 * One invalidation of the bytes from `start` up to and without `end`.
 *
 * A source initializes the struct with mmu_notifier_range_init(), and then starts and ends the
 * invalidation once. Bounds that are not multiples of 4096 are rounded outwards, and callbacks see
 * the rounded bounds (the kernel's sources give whole pages). A range without bytes calls no
 * callback. (In the kernel such a range calls the subscribers, and the range [0, 0) calls every
 * interval.) A range whose end is ULONG_MAX includes the last address.
 *
 * A callback gets a pointer to a constant range, which is valid until the callback returns. The
 * callback may copy the fields whose names do not begin with mmun_.
 */
struct mmu_notifier_range {
	struct mm_struct *mm;
	unsigned long start;
	unsigned long end;
	unsigned int flags;
	enum mmu_notifier_event event;
	void *owner; /* NULL unless the event has an owner. */
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

/* The table of a driver; each callback may be NULL. The table must live until every notifier that
 * uses it has been freed. */
struct mmu_notifier_ops {
	/* Drops every entry, because the address space ends. After release has returned, neither
	 * the driver nor its device may use the address space through this notifier. Exit calls
	 * release once. mmu_notifier_unregister() calls release too, unless exit has delisted the
	 * notifier already. So if both run at once, release runs twice, perhaps in parallel. May
	 * sleep. */
	void (*release)(struct mmu_notifier *subscription, struct mm_struct *mm);

	/* Clears the accessed bits of a range and flushes the TLB. Returns whether a bit was set.
	 * May sleep. */
	int (*clear_flush_young)(struct mmu_notifier *subscription, struct mm_struct *mm, unsigned long start,
				 unsigned long end);
	/* Like clear_flush_young, but need not flush. */
	int (*clear_young)(struct mmu_notifier *subscription, struct mm_struct *mm, unsigned long start,
			   unsigned long end);
	/* Returns whether the accessed bit of a page is set. */
	int (*test_young)(struct mmu_notifier *subscription, struct mm_struct *mm, unsigned long address);

	/* Drops every entry of a range that is about to change. The driver must make no new entry
	 * of the range before invalidate_range_end. Returns 0, or -EAGAIN if the range is not
	 * blockable and the callback would have to sleep. Any other error causes a warning (the
	 * kernel passes it on). The library treats it as -EAGAIN if the range is not blockable. If
	 * the range is blockable, the library ignores every error. */
	int (*invalidate_range_start)(struct mmu_notifier *subscription, const struct mmu_notifier_range *range);
	/* The change is over. Called for each subscriber that did not refuse the start, unless the
	 * subscriber was put or unregistered in between. (In the kernel, a subscriber that refused
	 * gets an end as well, and a warning.) */
	void (*invalidate_range_end)(struct mmu_notifier *subscription, const struct mmu_notifier_range *range);

	/* Flushes a TLB that walks the page table by itself. Must not sleep. A table with this
	 * function has neither invalidate_range_start nor invalidate_range_end. */
	void (*arch_invalidate_secondary_tlbs)(struct mmu_notifier *subscription, struct mm_struct *mm,
					       unsigned long start, unsigned long end);

	/* Makes the notifier of an address space that has none. The notifier must be ready for
	 * callbacks, because callbacks may run before mmu_notifier_get() returns. Runs under the
	 * write lock. Returns an ERR_PTR on failure; the library treats NULL as -ENOMEM (the kernel
	 * crashes). */
	struct mmu_notifier *(*alloc_notifier)(struct mm_struct *mm);
	/* Frees a notifier after the last put and a grace period, when no callback uses the
	 * notifier any more. Runs on a thread of the library, and must not wait. If the notifier
	 * that alloc_notifier made cannot be registered, mmu_notifier_get() calls free_notifier at
	 * once, under the write lock. */
	void (*free_notifier)(struct mmu_notifier *subscription);
};

/* A subscriber, a field of the driver's object. While the notifier is registered, the driver may
 * read `ops` and `mm`. */
struct mmu_notifier {
	const struct mmu_notifier_ops *ops;
	struct mm_struct *mm;
	size_t mmun_private[14];
};

/*
 * Returns the notifier of `ops` on `mm`, and takes a reference to it. Makes the notifier if there
 * is none. The caller must have a user of `mm`. When the function returns, every invalidation that
 * does not call this notifier has ended. The function also finds notifiers that were registered
 * with the same `ops`, and then returns the newest. To find a notifier, the function takes no lock,
 * so callbacks may call it (the kernel always takes the lock). To make a notifier, it sleeps.
 *
 * Errors, as ERR_PTR: the error of alloc_notifier; -EOVERFLOW if the reference count is full;
 * -EDEADLK if the notifier has to be made and this thread is inside an invalidation or callback of
 * `mm`, in free_notifier, or holds the write lock; -ESRCH if the address space has ended (the
 * kernel crashes) or belongs to the parent process; -EINVAL if the table or its alloc_notifier is
 * NULL, if the table has both invalidate_range_* and arch_invalidate_secondary_tlbs, and if _locked
 * is called without the lock.
 */
#define mmu_notifier_get mmun_get
#define mmu_notifier_get_locked mmun_get_locked
struct mmu_notifier *mmu_notifier_get(const struct mmu_notifier_ops *ops, struct mm_struct *mm);
struct mmu_notifier *mmu_notifier_get_locked(const struct mmu_notifier_ops *ops, struct mm_struct *mm);

/*
 * Drops a reference. The last put delists the notifier: no invalidation that starts afterwards
 * calls it, and an invalidation under way that has not reached the notifier yet skips it. After a
 * grace period, the library calls free_notifier. A put does not call release and never sleeps, so
 * every callback may put. If there are more puts than references and the notifier is not freed yet,
 * the surplus put prints a warning.
 */
#define mmu_notifier_put mmun_put
void mmu_notifier_put(struct mmu_notifier *subscription);

/*
 * Registers a notifier that the driver has made, with `ops` set. __mmu_notifier_register() is for a
 * caller that holds the write lock. The driver ends the registration with one
 * mmu_notifier_unregister(), or with mmu_notifier_put() if the table has free_notifier. When the
 * function returns, every invalidation that does not call the notifier has ended. Returns 0 or an
 * error of mmu_notifier_get(); after an error the notifier is unchanged.
 */
#define mmu_notifier_register mmun_register
#define __mmu_notifier_register mmun_register_locked
int mmu_notifier_register(struct mmu_notifier *subscription, struct mm_struct *mm);
int __mmu_notifier_register(struct mmu_notifier *subscription, struct mm_struct *mm);

/*
 * Calls release (unless exit has delisted the notifier already), delists the notifier, and waits
 * until no callback uses it. Then the driver may free the notifier. References from
 * mmu_notifier_get() become invalid. If this thread is inside an invalidation or callback of `mm`,
 * or in free_notifier, the function ends the process.
 */
#define mmu_notifier_unregister mmun_unregister
void mmu_notifier_unregister(struct mmu_notifier *subscription, struct mm_struct *mm);

/*
 * Waits until every notifier whose last put came before the call has been freed, whichever thread
 * made that put. Afterwards the driver's code can be unloaded. (The kernel's documentation promises
 * the same, but its function only waits for a grace period. This function returns at once if no
 * free is queued.) Inside an invalidation, a callback or free_notifier the function ends the
 * process.
 */
#define mmu_notifier_synchronize mmun_synchronize
void mmu_notifier_synchronize(void);

/* Returns whether an invalidation would call a subscriber or an interval. (In the kernel the result
 * stays true after the last subscriber has gone.) */
#define mm_has_notifiers mmun_mm_has_notifiers
bool mm_has_notifiers(struct mm_struct *mm);

/* ------------------------------------------------------------------------------------------------
 * Event sources: the code that changes an address space
 * ---------------------------------------------------------------------------------------------- */

/*
 * _start() calls invalidate_range_start of the subscribers, because the range is about to change,
 * and returns when they have dropped their entries. After the change, _end() calls their
 * invalidate_range_end. The same thread must call _start() and _end(), and must neither move nor
 * copy the range in between. Invalidations nest. Between start and end, no registration completes,
 * and no notifier that was put is freed. Intervals are called first, in the order of their
 * addresses, then the subscribers, newest first. Starting a range twice ends the process. Ending a
 * range that was not started does nothing.
 */
#define mmu_notifier_invalidate_range_start mmun_invalidate_range_start
#define mmu_notifier_invalidate_range_end mmun_invalidate_range_end
void mmu_notifier_invalidate_range_start(struct mmu_notifier_range *range);
void mmu_notifier_invalidate_range_end(struct mmu_notifier_range *range);

/* Like _start(), for a caller that may not sleep. Returns -EAGAIN if a subscriber or an interval
 * refuses because it would have to sleep. By then, every subscriber that accepted has had its end
 * called, and the caller must not call _end(). If a subscriber refuses, the other subscribers are
 * called nevertheless. If an interval refuses, no further interval and no subscriber is called. */
#define mmu_notifier_invalidate_range_start_nonblock mmun_invalidate_range_start_nonblock
int mmu_notifier_invalidate_range_start_nonblock(struct mmu_notifier_range *range);

/* Calls arch_invalidate_secondary_tlbs of every subscriber. */
#define mmu_notifier_arch_invalidate_secondary_tlbs mmun_arch_invalidate_secondary_tlbs
void mmu_notifier_arch_invalidate_secondary_tlbs(struct mm_struct *mm, unsigned long start, unsigned long end);

/* Each function calls the callback of the same name of the subscribers. Returns 1 if a callback
 * returned non-zero, else 0. mmu_notifier_test_young() stops at the first such callback. */
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
	/* Takes the driver's lock, always calls mmu_interval_set_seq() with `cur_seq`, and drops
	 * every entry of the range. Returns true, or false if the range is not blockable and the
	 * callback would have to sleep. Exit calls invalidate as well, with MMU_NOTIFY_RELEASE and
	 * the whole address space. */
	bool (*invalidate)(struct mmu_interval_notifier *interval_sub, const struct mmu_notifier_range *range,
			   unsigned long cur_seq);
};

/* An interval, a field of the driver's object. The driver may read all fields but mmun_private
 * while the interval is inserted. */
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
 * Inserts an interval of `length` bytes. _locked is for a caller that holds the write lock. When
 * the function returns, the interval may not be in the tree yet. So a reader begins with
 * mmu_interval_read_begin(), which waits until the interval is in the tree. The first insert on an
 * address space sleeps until the open invalidations have ended. Returns 0; -EOVERFLOW if `length`
 * is 0 or reaches beyond the last address; -EINVAL if the address space has ended or belongs to the
 * parent process, or if _locked is called without the lock; -EDEADLK if the function would wait for
 * its own thread.
 */
#define mmu_interval_notifier_insert mmun_interval_insert
#define mmu_interval_notifier_insert_locked mmun_interval_insert_locked
int mmu_interval_notifier_insert(struct mmu_interval_notifier *interval_sub, struct mm_struct *mm, unsigned long start,
				 unsigned long length, const struct mmu_interval_notifier_ops *ops);
int mmu_interval_notifier_insert_locked(struct mmu_interval_notifier *interval_sub, struct mm_struct *mm,
					unsigned long start, unsigned long length,
					const struct mmu_interval_notifier_ops *ops);

/* Removes an interval and waits until no callback of the interval runs. Then the driver may free
 * the interval. If the function would wait for its own thread, it ends the process. */
#define mmu_interval_notifier_remove mmun_interval_remove
void mmu_interval_notifier_remove(struct mmu_interval_notifier *interval_sub);

/*
 * Returns the sequence number that a reader takes before it looks pages up. While an invalidation
 * that overlaps the interval runs, the function sleeps. If this thread has opened that
 * invalidation, sleeping would hang, so the function returns 0. For the sequence number 0,
 * mmu_interval_read_retry() always returns true. The function also returns 0 in the child of a
 * fork.
 */
#define mmu_interval_read_begin mmun_interval_read_begin
unsigned long mmu_interval_read_begin(struct mmu_interval_notifier *interval_sub);

/* Returns whether the range was invalidated since the sequence number was taken. The caller must
 * hold the driver's lock. mmu_interval_check_retry() is the same function, for a caller without the
 * lock: a result of true is reliable, a result of false is not. */
#define mmu_interval_read_retry mmun_interval_read_retry
#define mmu_interval_check_retry mmun_interval_read_retry
bool mmu_interval_read_retry(struct mmu_interval_notifier *interval_sub, unsigned long seq);

/* Stores the sequence number of an invalidation in the interval. Only `invalidate` may call this
 * function, under the driver's lock. */
#define mmu_interval_set_seq mmun_interval_set_seq
void mmu_interval_set_seq(struct mmu_interval_notifier *interval_sub, unsigned long cur_seq);

#ifdef __cplusplus
}
#endif

#endif
