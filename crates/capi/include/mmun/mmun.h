/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * For code that keeps translations of addresses: a registration cache, a DMA map, a software TLB.
 *
 * Memory that was registered with a device under an address can be unmapped, and other memory
 * mapped at the same address. A cache that still finds the old registration then lets the device
 * read and write memory that is no longer the program's. This library tells you in time.
 *
 *	struct mmun *mmun;
 *	if (mmun_open(NULL, &mmun) < 0)
 *		errx(1, "%s", mmun_last_error());
 *
 *	struct mmun_watch *watch;
 *	mmun_watch(mmun, buffer, length, &watch);	// First the watch,
 *	key = register_memory(buffer, length);		// then what it stands for.
 *
 *	if (mmun_watch_valid(watch))			// At every use: about a nanosecond.
 *		transfer(key);
 *
 * Three ways to use it, from the least to the most that is done for you to decide:
 *
 * | you have                               | use                                           |
 * | -------------------------------------- | --------------------------------------------- |
 * | no cache yet                           | mmun_regcache_open(): a complete one          |
 * | a cache with entries and a look-up     | one mmun_watch() for each entry               |
 * | an index by address, and your own lock | mmun_subscribe(): a callback for each change  |
 *
 * A driver that was written for the kernel's MMU notifiers wants mmun/mmu_notifier.h instead. Both
 * headers can be used together: subscribers of both hear the changes of mmun_current_mm().
 *
 * RULES FOR EVERY FUNCTION
 *
 * Errors     0 or a negative error number. mmun_last_error() has the details as a line of text.
 * Arguments  A null or misaligned pointer, an empty range and a range that wraps are -EINVAL.
 *            Results are NULL after an error. Arguments may overlap: inputs are read before outputs
 *            are written.
 * Structs    Begin with their size, which you set: the library knows by it what your header has. If
 *            you are older than the library, fields that you do not have count as zero. If you are
 *            newer, fields that the library does not know must be zero, or the call is -E2BIG.
 * Threads    Any thread may call any function at any time, also several with the same handle,
 *            unless the function says otherwise. As everywhere in C, what is closed must not be
 *            used. A call that ends a handle (close, unsubscribe, unwatch, put) must be the only
 *            one with that handle: two threads that end it at the same time free it twice, as with
 *            free().
 * Callbacks  May run in any thread, several at once, and in the middle of malloc() and free(). See
 *            struct mmun_change for what they may do. An exception of C++ that leaves a callback
 *            ends the process with a message.
 * fork       In the child everything made before the fork is the parent's: watches are not valid,
 *            functions with a result return -ESRCH, and what is given back is only freed. Open
 *            again in the child. No function hangs there.
 * Handles    Keep what they need: a struct mmun may be closed before what was made from it.
 * Signals    In a signal handler only mmun_watch_valid() may be called.
 * Cancelling pthread_cancel() takes effect after a function that opens, closes, subscribes or
 *            watches, and after the functions of a registrar. A thread that is cancelled in a
 *            callback of struct mmun_ops ends the process with a message. Asynchronous
 *            cancellation must be off.
 * Stacks     64 KiB are enough for every function, beside what callbacks of yours take.
 * Loading    The library may be linked, or loaded by dlopen() at any time; dlclose() leaves it
 *            loaded. Its thread-local words (352 bytes) lie in the space that glibc keeps for all
 *            libraries that come late, 1,664 bytes. If others have used that up, dlopen() fails with
 *            "cannot allocate memory in static TLS block": link or preload the library, load it
 *            earlier, or run with GLIBC_TUNABLES=glibc.rtld.optional_static_tls=4096. A debug build
 *            takes 1,144 bytes.
 */
#ifndef MMUN_MMUN_H
#define MMUN_MMUN_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of the binary interface: the major one times 65536, and the minor one. */
#define MMUN_ABI_VERSION 1u

/* Returns the version of the library that is loaded. Programs work with any library of the same
 * major version and at least the same minor version. */
uint32_t mmun_abi_version(void);

/* Returns what an error number means in this library, in English. Static; never NULL. */
const char *mmun_strerror(int error);

/* Returns what there is to say of the last call that failed in this thread: which source lacks
 * what, and the command that grants it. Valid until the next call that fails in this thread. Never
 * NULL; empty if no call has failed. */
const char *mmun_last_error(void);

/* ------------------------------------------------------------------------------------------------
 * Sources: who says that memory changes
 * ---------------------------------------------------------------------------------------------- */

/* The event sources of this process. One process needs one; several share what they have. */
struct mmun;

/*
 * MMUN_SOURCE_HOOK    Patches libc: sees munmap, mmap over live memory, mremap, madvise, brk,
 *                     shmdt, mprotect and syscall(2) of this process, before they happen. Misses
 *                     what is not a call through libc: truncation of a file, io_uring, other
 *                     processes, copy on write, reclaim. Needs glibc on x86-64 or aarch64.
 * MMUN_SOURCE_KERNEL  The kernel's own MMU notifier. Misses nothing. Needs /dev/kvm, CAP_BPF and
 *                     CAP_PERFMON, Linux 5.12.
 * MMUN_SOURCE_OWN     The invalidations that the program opens itself, on mmun_current_mm() of
 *                     mmun/mmu_notifier.h. Needs nothing, and misses everything else.
 */
#define MMUN_SOURCE_HOOK (1u << 0)
#define MMUN_SOURCE_KERNEL (1u << 1)
#define MMUN_SOURCE_OWN (1u << 2)

struct mmun_options {
	size_t size;       /* sizeof(struct mmun_options) */
	uint32_t sources;  /* Which to start, if they work here. 0: hook and kernel. */
	uint32_t required; /* Without which of them to fail. */
};

/*
 * Opens the sources. NULL for the options: hook and kernel, those that work here, and at least
 * one of them. Takes some ten milliseconds at first. The kernel source starts threads.
 *
 * -EOPNOTSUPP: a required source does not work here, or none of them does; mmun_last_error() says
 * what is missing and how to grant it. -EINVAL, -E2BIG: the options. Else what the kernel said.
 */
int mmun_open(const struct mmun_options *options, struct mmun **mmun);

/* Gives the handle back; NULL does nothing. The sources end with the last handle, watch,
 * subscription and cache. Not in a callback. */
void mmun_close(struct mmun *mmun);

struct mmun_status {
	size_t size;            /* sizeof(struct mmun_status) */
	uint32_t sources;       /* Which run: MMUN_SOURCE_*. */
	uint32_t complete;      /* 1 if no change can be missed. */
	uint32_t inherited;     /* 1 if this is the child of a fork, and the handle the parent's. */
	uint32_t reserved;
	uint64_t subscriptions; /* How many there are of this handle, */
	uint64_t watches;
	uint64_t caches;
	uint64_t changes;       /* Changes of watched memory that the kernel source has counted. */
	uint64_t lost;          /* How often it lost records, and reported a change of everything. */
	char no_hook[256];      /* Why a source that was asked for does not run; empty if it does. */
	char no_kernel[256];
};

/* Fills in what runs. Call it once after mmun_open() and tell the user: with complete == 0, changes
 * can be missed. */
int mmun_status(const struct mmun *mmun, struct mmun_status *status);

/* ------------------------------------------------------------------------------------------------
 * Watches: one question about one range
 * ---------------------------------------------------------------------------------------------- */

/* A range, and whether it has been touched since. */
struct mmun_watch;

/*
 * Watches the pages of `length` bytes at `address`. Translate the range after it returns: no change
 * that began before is under way then. The memory need not be mapped.
 *
 * Marked by the kernel source where that runs, else by the hook and by invalidations that the
 * program opens. May wait for changes under way, so it must not be called in a callback: -EDEADLK
 * or a wait for a lock.
 */
int mmun_watch(const struct mmun *mmun, const void *address, size_t length, struct mmun_watch **watch);

/*
 * Tells whether nothing has touched the range since mmun_watch() or mmun_watch_renew(). No
 * callback, no lock, no allocation, no wait: it may be called anywhere, under any lock, in free(),
 * in a callback and in a signal handler.
 *
 * Ask before an entry is used; and once more afterwards if another thread can unmap what is in use.
 * With the kernel source the answer may be a needless false, if another thread keeps the records
 * busy. False for NULL.
 */
bool mmun_watch_valid(const struct mmun_watch *watch);

/* Begins anew, cheaper than another watch; translate the range again afterwards. Waits as
 * mmun_watch() does. No other thread may use the watch meanwhile. After an error the watch is not
 * valid. */
int mmun_watch_renew(struct mmun_watch *watch);

/* Gives a watch up; NULL does nothing. Waits for no callback. */
void mmun_unwatch(struct mmun_watch *watch);

/* ------------------------------------------------------------------------------------------------
 * Subscriptions: a callback for each change
 * ---------------------------------------------------------------------------------------------- */

struct mmun_subscription;

/* What changes. A hint: a subscriber that lets go of everything each time is correct. The numbers
 * are those of enum mmu_notifier_event. */
enum mmun_event {
	MMUN_EVENT_UNMAP = 0,           /* The mapping goes away or moves. */
	MMUN_EVENT_CLEAR = 1,           /* The pages go; of MMUN_CAUSE_KERNEL: anything. */
	MMUN_EVENT_PROTECTION_VMA = 2,  /* The protection of the mapping changes. */
	MMUN_EVENT_PROTECTION_PAGE = 3, /* That of single pages does. */
	MMUN_EVENT_SOFT_DIRTY = 4,
	MMUN_EVENT_MIGRATE = 6,
	MMUN_EVENT_EXCLUSIVE = 7
};

/* Who says so. */
enum mmun_cause {
	/* The thread that makes the change, before (start) and after it (end): the hook, or the
	 * program itself. It may hold the allocator's locks. */
	MMUN_CAUSE_CALLER = 0,
	/* The kernel source: the change has begun, and may be over. In a thread of the source, or
	 * one that asked it. start and end come one after the other. */
	MMUN_CAUSE_KERNEL = 1
};

/*
 * One change, of the bytes from `start` up to and without `end`, whole pages. `end` is UINTPTR_MAX
 * if the range reaches the last address.
 *
 * A callback with MMUN_CAUSE_CALLER may stand in the middle of free(): it must not allocate, free,
 * print, nor take a lock that any thread holds while it does so. It may map and unmap. A callback
 * with MMUN_CAUSE_KERNEL may do all of that; it must not wait for a thread that calls this library.
 * No callback may unsubscribe, close, or open.
 */
struct mmun_change {
	size_t size; /* What the library has; a later one may have more. */
	uintptr_t start;
	uintptr_t end;
	uint32_t event; /* enum mmun_event */
	uint32_t cause; /* enum mmun_cause */
};

/* The functions of a subscriber. Each may be NULL. */
struct mmun_ops {
	size_t size; /* sizeof(struct mmun_ops) */

	/* Lets go of everything in the range. When it returns, nothing may use the old translation,
	 * nor may a new one be entered before `end`. */
	void (*start)(void *context, const struct mmun_change *change);
	/* The change is over. */
	void (*end)(void *context, const struct mmun_change *change);
};

/*
 * Calls `ops` for every change of this process's memory from now on. `ops` itself is not kept. What
 * changes while this runs is told, or over when it returns.
 *
 * With the kernel source, a change is told soon after it has begun. A cache that must not serve a
 * stale entry calls mmun_settle() before each look-up, or keeps a watch in each entry and uses
 * callbacks only to free entries early.
 *
 * -EDEADLK in a callback or inside an invalidation.
 */
int mmun_subscribe(const struct mmun *mmun, const struct mmun_ops *ops, void *context,
		   struct mmun_subscription **subscription);

/* Ends a subscription: when it returns 0, no callback runs, and none will. -EDEADLK in a callback
 * or inside an invalidation, where it would wait for itself; then the subscription stays. Only one
 * thread may call it for a subscription, also while the call waits: a second call uses freed
 * memory. */
int mmun_unsubscribe(struct mmun_subscription *subscription);

/* Runs the callbacks of all changes that began before the call, or waits for them. Two loads if
 * nothing has happened; else the callbacks run here. Needed with the kernel source only; elsewhere
 * it does nothing. -EDEADLK in a callback of the kernel source. */
int mmun_settle(const struct mmun *mmun);

/*
 * Around filling a cache that has a subscription: the pattern of mmu_interval_read_begin().
 *
 *	for (;;) {
 *		seq = mmun_fill_begin(mmun);	// Without the lock: it waits for callbacks.
 *		if (!seq)
 *			return -1;		// mmun_last_error() says why: a callback, a fork
 *		key = register_memory(buffer, length);
 *		lock();				// The lock that `start` takes as well.
 *		retry = mmun_fill_retry(mmun, seq);
 *		if (!retry)
 *			insert(buffer, length, key);	// Must not allocate, as `start` takes the lock.
 *		unlock();
 *		if (!retry)
 *			break;
 *		deregister_memory(key);
 *	}
 *
 * _begin waits until no change is under way and returns a number for that moment. _retry tells
 * whether any change of memory that is watched or subscribed to has begun since: then the
 * registration may be of the old memory, and must not be found by another thread. A change that
 * begins after _retry was false finds the entry: its `start` waits for the lock. A cache that
 * watches its entries needs neither.
 *
 * _begin returns 0 in a callback or inside an invalidation, and in the child of a fork; _retry of 0
 * is true.
 */
uint64_t mmun_fill_begin(const struct mmun *mmun);
bool mmun_fill_retry(const struct mmun *mmun, uint64_t seq);

/* ------------------------------------------------------------------------------------------------
 * The registration cache
 * ---------------------------------------------------------------------------------------------- */

/* A cache of registrations that serves no stale one. It takes care of watching, filling and
 * eviction. */
struct mmun_regcache;

/* deregister_region may be called in a callback with MMUN_CAUSE_CALLER, with its rules; so that a
 * region that is not leased is deregistered before its memory goes away. Without the flag that is
 * done by a later call. */
#define MMUN_REGISTRAR_IN_CALLBACKS (UINT64_C(1) << 0)

/* How memory is registered: two functions of yours. Called without a lock, by several threads at
 * once, for ranges that may overlap; they must not use the cache that calls them. */
struct mmun_registrar {
	size_t size; /* sizeof(struct mmun_registrar) */
	void *context;

	/* Registers memory and stores what you know it by, such as a struct ibv_mr *. 0, or a
	 * negative error number, and then nothing is registered. -ENOMEM, -EAGAIN and -ENOSPC make
	 * the cache evict something and try once more. */
	int (*register_region)(void *context, void *address, size_t length, void **handle);
	/* Undoes it, once for each handle, when no lease uses it any more. Cannot fail. */
	void (*deregister_region)(void *context, void *address, size_t length, void *handle);

	uint64_t flags; /* MMUN_REGISTRAR_* */
};

#define MMUN_MERGE_OVERLAPPING 0u /* One region for all requests that overlap. */
#define MMUN_MERGE_NEVER 1u       /* Each request for itself. */
#define MMUN_MERGE_ADJACENT 2u    /* Also those that touch. */

struct mmun_regcache_options {
	size_t size;               /* sizeof(struct mmun_regcache_options) */
	uint32_t merge;            /* MMUN_MERGE_* */
	uint32_t max_regions;      /* 0: 65536 */
	uint64_t max_bytes;        /* 0: no limit */
	uint64_t max_region_bytes; /* What merging may make, at most. 0: 1 GiB */
};

/* A lease of a region, in memory of yours; it may be moved, and put by another thread. Must not be
 * copied and put twice. */
struct mmun_lease {
	void *handle; /* What register_region has stored. */
	size_t mmun_private[2];
};

/* Opens a cache for this process's memory. NULL for the options: all zero. `registrar` itself is
 * not kept. */
int mmun_regcache_open(const struct mmun *mmun, const struct mmun_registrar *registrar,
		       const struct mmun_regcache_options *options, struct mmun_regcache **cache);

/* Deregisters everything and ends the cache: when it returns 0, the registrar is not called any
 * more. NULL does nothing. No other thread may use the cache meanwhile. -EBUSY if a lease has not
 * been put, -EDEADLK in a callback or inside an invalidation; then the cache stays. */
int mmun_regcache_close(struct mmun_regcache *cache);

/*
 * Leases a region that covers the bytes, and registers one if there is none. A hit takes some ten
 * nanoseconds and no lock.
 *
 * The region stays registered until mmun_regcache_put(), whatever happens to the memory: if that is
 * taken away meanwhile, mmun_lease_valid() says so, and no later call finds the region.
 *
 * What the registrar said; -ENOSPC: full of leased regions; -EFBIG: larger than max_bytes;
 * -EDEADLK: a miss in a callback of the kernel source. The lease is empty then.
 */
int mmun_regcache_get(const struct mmun_regcache *cache, void *address, size_t length, struct mmun_lease *lease);

/* Ends a lease. Ends the process with a message if there is none: put twice, or never got. */
void mmun_regcache_put(struct mmun_lease *lease);

/*
 * Tells whether the region still stands for the memory at its address. Ask after a transfer: true
 * means that the transfer went to the memory that the program has there.
 *
 * False means that this is not known, and a transfer that counts is to be made again with a new
 * lease. The memory has been unmapped or changed since the lease was got, perhaps by a program that
 * frees what is in use. Or no memory of the program was lost: the region was flushed or gave way to
 * a larger one, or a change of the same addresses was still under way in another thread when the
 * lease was got, as when that thread's munmap() had not returned and the kernel had already given
 * the addresses to this one.
 *
 * False for NULL and for what was put.
 */
bool mmun_lease_valid(const struct mmun_lease *lease);

/* Returns what is registered, which may be more than what was asked for. */
int mmun_lease_range(const struct mmun_lease *lease, void **address, size_t *length);

/* Takes everything out of the cache and deregisters what is not leased. Returns how many regions
 * there were. */
uint64_t mmun_regcache_flush(const struct mmun_regcache *cache);

/* Deregisters what was taken out in callbacks. Misses and puts do so too; this is for programs that
 * have neither for a long time. */
void mmun_regcache_reap(const struct mmun_regcache *cache);

struct mmun_regcache_stats {
	size_t size;           /* sizeof(struct mmun_regcache_stats) */
	uint64_t hits;         /* Requests that found a region, */
	uint64_t misses;       /* that did not, */
	uint64_t waits;        /* that waited for another one's registration. */
	uint64_t registered;   /* Calls of register_region that succeeded, */
	uint64_t deregistered; /* calls of deregister_region, */
	uint64_t failed;       /* calls of register_region that failed. */
	uint64_t invalidated;  /* Regions taken out because their memory changed, */
	uint64_t replaced;     /* because a larger one took their place, */
	uint64_t evicted;      /* to make room, */
	uint64_t flushed;      /* by mmun_regcache_flush(). */
	uint64_t collisions;   /* Registrations that a change met half-way, and that were made again. */
	uint64_t lost;         /* How often the kernel source lost records, and everything was taken out. */
	uint64_t regions;      /* Regions that are registered now, */
	uint64_t bytes;
	uint64_t live_regions; /* and those of them that are found. */
	uint64_t live_bytes;
};

/* Fills in what the cache did and holds. */
int mmun_regcache_stats(const struct mmun_regcache *cache, struct mmun_regcache_stats *stats);

#ifdef __cplusplus
}
#endif

#endif
