/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * For code that keeps translations of addresses: a registration cache, a DMA map, a software TLB.
 *
 * A program can unmap memory that it has registered with a device, and then map other memory at the
 * same address. A cache that still finds the old registration lets the device read and write pages
 * that the program no longer owns. This library reports the change before the cache can return the
 * stale registration.
 *
 *	struct mmun *mmun;
 *	if (mmun_open(NULL, &mmun) < 0)
 *		errx(1, "%s", mmun_last_error());
 *
 *	struct mmun_watch *watch;
 *	mmun_watch(mmun, buffer, length, &watch);	// First the watch,
 *	key = register_memory(buffer, length);		// then the registration.
 *
 *	if (mmun_watch_valid(watch))			// At every use: about a nanosecond.
 *		transfer(key);
 *
 * Three ways to use the library:
 *
 * | you have                               | use                                           |
 * | -------------------------------------- | --------------------------------------------- |
 * | no cache yet                           | mmun_regcache_open(): a complete one          |
 * | a cache with entries and a look-up     | one mmun_watch() for each entry               |
 * | an index by address, and your own lock | mmun_subscribe(): a callback for each change  |
 *
 * For a driver that was written for the kernel's MMU notifiers, use mmun/mmu_notifier.h. A program
 * can use both headers: the changes of mmun_current_mm() reach the subscribers of both.
 *
 * RULES FOR EVERY FUNCTION
 *
 * Errors     A function returns 0 or a negative error number. mmun_last_error() returns the details
 *            as one line of text.
 * Memory     Functions that open return -ENOMEM for the large parts: mmun_open() also at the limit
 *            of mappings (sysctl vm.max_map_count), mmun_regcache_open() for its tables. A lack of
 *            memory for small objects, such as a watch, for a table of a cache that grows, and for
 *            the counters of a new thread ends the process with a message, as it does in most
 *            programs of Rust.
 * Arguments  A null handle, a null or misaligned pointer to a struct or to a result, an empty range
 *            and a range that wraps are -EINVAL. A function that fails sets a resulting handle to
 *            NULL. Arguments may overlap: a function reads all inputs before it writes an output.
 * Structs    The first field of a struct is its size. The caller sets it to sizeof, and the library
 *            learns from it which fields the caller's header has. The library reads a field that an
 *            older caller does not have as zero. A newer caller must leave each field that the
 *            library does not know at zero, or the function fails with -E2BIG.
 * Threads    Any thread may call any function at any time, also several threads with the same
 *            handle, unless the function says otherwise. A closed handle must not be used. While
 *            one thread ends a handle (close, unsubscribe, unwatch, put), no other thread may use
 *            it: if two threads end one handle at the same time, its memory is freed twice.
 * Callbacks  A callback may run in any thread, in several threads at once, and in the middle of
 *            malloc() and free(). struct mmun_change says what a callback may do. A C++ exception
 *            that leaves a callback ends the process with a message.
 * fork       In the child, every handle that was made before the fork belongs to the parent: a
 *            watch is not valid, functions with a result return -ESRCH, and closing a handle only
 *            frees its memory. Call mmun_open() again in the child. No function hangs there. The
 *            same holds for a child made by _Fork() or by the clone system call without CLONE_VM,
 *            if its first thread calls a function of this library, such as mmun_close(), before
 *            any other thread of the child does, and if no other thread of the parent was in
 *            mmun_open() or in the allocator.
 * Handles    Each handle keeps the objects that it needs: a program may close a struct mmun before
 *            the watches, subscriptions and caches that were made from it.
 * Signals    A signal handler may call mmun_watch_valid() and no other function.
 * Cancelling While a thread is in a function that opens, closes, subscribes or watches, or in a
 *            function of a registrar, pthread_cancel() takes effect only when that function
 *            returns. Cancelling a thread in a callback of struct mmun_ops ends the process with a
 *            message. Asynchronous cancellation must be off.
 * Stacks     Every function needs at most 64 KiB of stack, besides what your callbacks use.
 * Loading    A program may link the library, or load it with dlopen() at any time; dlclose() leaves
 *            it loaded. The library has 352 bytes of static TLS. glibc reserves 1,664 bytes of
 *            static TLS for all libraries that are loaded late. If other libraries have used up
 *            that space, dlopen() fails with "cannot allocate memory in static TLS block": link or
 *            preload the library, load it earlier, or run the program with
 *            GLIBC_TUNABLES=glibc.rtld.optional_static_tls=4096. A debug build has 1,144 bytes.
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

/* The version of the binary interface: the major version times 65536, plus the minor version. */
#define MMUN_ABI_VERSION 1u

/* Returns the version of the library that is loaded. Programs work with any library of the same
 * major version and at least the same minor version. */
uint32_t mmun_abi_version(void);

/* Returns what an error number means in this library, in English. The string is static and never
 * NULL. */
const char *mmun_strerror(int error);

/* Returns the reason for the last failure of a function in this thread: for example which right a
 * source lacks, and the command that grants it. The string is valid until the next failure in this
 * thread. It is never NULL, and empty if no function has failed. */
const char *mmun_last_error(void);

/* ------------------------------------------------------------------------------------------------
 * Sources: they report that memory changes
 * ---------------------------------------------------------------------------------------------- */

/* The event sources of this process. One handle is enough for a process; several handles share the
 * same sources. */
struct mmun;

/*
 * MMUN_SOURCE_HOOK    Patches libc. It sees munmap, mmap over live memory, mremap, madvise, brk,
 *                     shmdt, mprotect and syscall(2) of this process, before they happen. It misses
 *                     ftruncate and fallocate of a mapped file, copy on write, and every change
 *                     that is not a call through libc: io_uring, other processes, reclaim. It needs glibc on x86-64 or aarch64.
 * MMUN_SOURCE_KERNEL  Reads the kernel's own MMU notifiers. It misses no change. It needs /dev/kvm,
 *                     CAP_BPF, CAP_PERFMON and Linux 5.12, or a broker ("mmun broker").
 * MMUN_SOURCE_OWN     Sees the invalidations that the program itself opens on mmun_current_mm() of
 *                     mmun/mmu_notifier.h, and no other change. It needs nothing.
 */
#define MMUN_SOURCE_HOOK (1u << 0)
#define MMUN_SOURCE_KERNEL (1u << 1)
#define MMUN_SOURCE_OWN (1u << 2)

struct mmun_options {
	size_t size;       /* sizeof(struct mmun_options) */
	uint32_t sources;  /* Sources to start, if they work here. 0: hook and kernel. */
	uint32_t required; /* Sources to start; mmun_open() fails if one of them does not work. */
};

/*
 * Opens the sources. If options is NULL, the function starts those of hook and kernel that work
 * here, and fails if neither works. The first call takes some ten milliseconds. The kernel source
 * starts threads.
 *
 * -EOPNOTSUPP: a required source does not work here, or no source works. mmun_last_error() then
 * names the missing feature or right, and how to grant it. -EINVAL, -E2BIG: the options are wrong.
 * -ENOMEM: no memory, or the limit of mappings is reached. Other errors come from the kernel. While
 * the kernel source runs, mmun_watch() and functions that wait need up to eight free descriptors.
 */
int mmun_open(const struct mmun_options *options, struct mmun **mmun);

/* Closes the handle; for NULL it does nothing. The sources end when the last handle, watch,
 * subscription and cache has ended. Must not be called in a callback. */
void mmun_close(struct mmun *mmun);

struct mmun_status {
	size_t size;            /* sizeof(struct mmun_status) */
	uint32_t sources;       /* The sources that run: MMUN_SOURCE_*. */
	uint32_t complete;      /* 1 if no change can be missed. */
	uint32_t inherited;     /* 1 in the child of a fork, if the parent made the handle. */
	uint32_t reserved;
	uint64_t subscriptions; /* Number of subscriptions of this handle, */
	uint64_t watches;       /* of its watches, */
	uint64_t caches;        /* and of its caches. */
	uint64_t changes;       /* Changes of watched memory that the kernel source has counted. */
	uint64_t lost;          /* How often the kernel source lost records. After each loss it
				 * reports a change of all memory. */
	char no_hook[256];      /* Why the hook does not run; empty if it runs or was not requested. A
				 * text that is too long lacks clauses, but no part of a command. */
	char no_kernel[256];    /* The same for the kernel source. */
};

/* Writes the state of the sources to `status`. Call this function once after mmun_open(), and warn
 * the user if complete is 0, because then the sources can miss changes. */
int mmun_status(const struct mmun *mmun, struct mmun_status *status);

/* ------------------------------------------------------------------------------------------------
 * Watches: has the memory of this range changed?
 * ---------------------------------------------------------------------------------------------- */

/* A range, and whether its memory has changed since the watch was made or renewed. */
struct mmun_watch;

/*
 * Watches the pages of `length` bytes at `address`. Translate the range after this function has
 * returned: then every change that began before the call is over. The memory need not be mapped,
 * and `address` may be any address.
 *
 * A change of the range makes the watch invalid. If the kernel source runs, it detects the changes.
 * Otherwise the hook and the invalidations that the program opens do. The function may wait for
 * changes under way, so it returns -EDEADLK in a callback or inside an invalidation.
 *
 * -EINVAL: the range is empty or wraps. -ESRCH: the handle is the parent's. With the kernel source
 * also -EMFILE and -ENFILE (a limit of open files) and other errors of KVM.
 */
int mmun_watch(const struct mmun *mmun, const void *address, size_t length, struct mmun_watch **watch);

/*
 * Returns true if the memory of the range has not changed since mmun_watch() or mmun_watch_renew().
 * The function runs no callback, takes no lock, allocates nothing and does not wait. So it may be
 * called anywhere: under any lock, in free(), in a callback and in a signal handler.
 *
 * Call it before each use of an entry. If another thread can unmap memory that is in use, call it
 * again after the use. It returns false for NULL.
 *
 * With the kernel source it may return false although the range has not changed. This happens while
 * another thread keeps reading the source's records, after a change of the same addresses in
 * another process with a virtual machine, such as a parent or child that has opened the library
 * too, and after a change of other memory nearby. If
 * munmap(), mprotect() or mremap() cuts a mapping at an address that is not a multiple of 2 MiB,
 * the kernel announces a change of the whole 2 MiB around the cut, even if no huge page lies there.
 * So give buffers that are unmapped one by one mappings of their own, with a gap or different
 * protection between them, or unmap in multiples of 2 MiB.
 */
bool mmun_watch_valid(const struct mmun_watch *watch);

/* Makes the watch valid again, which is cheaper than a new watch. Translate the range again
 * afterwards. Waits as mmun_watch() does, and returns -EDEADLK in the same cases. No other thread
 * may use the watch meanwhile. After an error the watch is not valid. */
int mmun_watch_renew(struct mmun_watch *watch);

/* Ends a watch; for NULL it does nothing. Waits for no callback. */
void mmun_unwatch(struct mmun_watch *watch);

/* ------------------------------------------------------------------------------------------------
 * Subscriptions: a callback for each change
 * ---------------------------------------------------------------------------------------------- */

struct mmun_subscription;

/* The kind of a change. The kind is only a hint: a subscriber is correct if it ignores the kind and
 * drops every entry of the range. The values are those of enum mmu_notifier_event. */
enum mmun_event {
	MMUN_EVENT_UNMAP = 0,           /* The mapping is removed or moved. */
	MMUN_EVENT_CLEAR = 1,           /* The pages are discarded. With MMUN_CAUSE_KERNEL: any change. */
	MMUN_EVENT_PROTECTION_VMA = 2,  /* The protection of the mapping changes. */
	MMUN_EVENT_PROTECTION_PAGE = 3, /* The protection of single pages changes. */
	MMUN_EVENT_SOFT_DIRTY = 4,
	MMUN_EVENT_MIGRATE = 6,
	MMUN_EVENT_EXCLUSIVE = 7
};

/* Where a callback comes from. */
enum mmun_cause {
	/* The hook, or an invalidation of the program: `start` runs before the change and `end`
	 * after it, in the thread that makes the change. The thread may hold the allocator's
	 * locks. */
	MMUN_CAUSE_CALLER = 0,
	/* The kernel source: the change has begun, and may be over. The callback runs in a thread
	 * of the source, or in a thread that called mmun_settle() or another function that waits.
	 * `end` follows `start` at once. */
	MMUN_CAUSE_KERNEL = 1
};

/*
 * One change, of the pages from `start` up to and without `end`. `end` is UINTPTR_MAX if the range
 * includes the last address.
 *
 * A callback with MMUN_CAUSE_CALLER may run in the middle of free(). So it must not allocate, free
 * or print, and must not take a lock that any thread holds while it allocates, frees or prints. The
 * callback may map and unmap. A callback with MMUN_CAUSE_KERNEL may also allocate, free and print,
 * but must not wait for a thread that calls this library. No callback may unsubscribe, close, or
 * open.
 */
struct mmun_change {
	size_t size; /* Size in the library; a newer library may append fields. */
	uintptr_t start;
	uintptr_t end;
	uint32_t event; /* enum mmun_event */
	uint32_t cause; /* enum mmun_cause */
};

/* The functions of a subscriber. Each may be NULL. */
struct mmun_ops {
	size_t size; /* sizeof(struct mmun_ops) */

	/* Drops every entry of the range. After `start` has returned, no thread may use an old
	 * translation of the range, and before `end` no thread may enter a new one. */
	void (*start)(void *context, const struct mmun_change *change);
	/* The change is over. */
	void (*end)(void *context, const struct mmun_change *change);
};

/*
 * Calls `ops` for every change of this process's memory from now on. The library copies `ops`. If a
 * change is made while this function runs, either the change's callbacks run, or the change is over
 * when the function returns.
 *
 * With the kernel source, callbacks run soon after a change has begun, and one callback can stand
 * for several changes of the same range. A cache that must not return a stale entry calls
 * mmun_settle() before each look-up, or keeps a watch in each entry and uses callbacks only to free
 * entries early.
 *
 * -EDEADLK in a callback or inside an invalidation. -ESRCH: the handle is the parent's. -EINVAL,
 * -E2BIG: `ops` is wrong.
 */
int mmun_subscribe(const struct mmun *mmun, const struct mmun_ops *ops, void *context,
		   struct mmun_subscription **subscription);

/* Ends a subscription: after the function has returned 0, no callback runs, and no further callback
 * starts. In a callback or inside an invalidation the function would wait for itself, so it returns
 * -EDEADLK, and the subscription stays. While the function waits, no other thread may end the same
 * subscription, because the first call frees its memory. */
int mmun_unsubscribe(struct mmun_subscription *subscription);

/* Runs the callbacks of all changes that began before the call, or waits until another thread has
 * run them. Costs two loads if no memory has changed. Without the kernel source the function does
 * nothing, because the other sources run the callbacks in the thread that makes the change. Returns
 * -EDEADLK in a callback of the kernel source. */
int mmun_settle(const struct mmun *mmun);

/*
 * For filling a cache that has a subscription, with the pattern of mmu_interval_read_begin().
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
 * _begin waits until no change is under way and returns a sequence number. _retry returns true if a
 * change of watched or subscribed memory has begun since then: the registration may be of the old
 * memory, and must not be published. If a change begins after _retry has returned false, its
 * `start` waits for the lock and finds the entry. A cache that watches its entries needs neither
 * function.
 *
 * _begin returns 0 in a callback, inside an invalidation, and in the child of a fork. For the
 * sequence number 0, _retry returns true.
 */
uint64_t mmun_fill_begin(const struct mmun *mmun);
bool mmun_fill_retry(const struct mmun *mmun, uint64_t seq);

/* ------------------------------------------------------------------------------------------------
 * The registration cache
 * ---------------------------------------------------------------------------------------------- */

/* A cache of registrations that never returns a stale registration. It watches, fills and evicts by
 * itself. */
struct mmun_regcache;

/* With this flag, the cache may call deregister_region in a callback with MMUN_CAUSE_CALLER, and
 * the rules for such callbacks hold for deregister_region. So a region without a lease is
 * deregistered before its memory changes. Without the flag, a later function of the cache
 * deregisters the region. */
#define MMUN_REGISTRAR_IN_CALLBACKS (UINT64_C(1) << 0)

/* Your two functions that register and deregister memory. The cache may call them in several
 * threads at once, for ranges that overlap, and holds no lock meanwhile. The functions must not use
 * the cache that calls them. */
struct mmun_registrar {
	size_t size; /* sizeof(struct mmun_registrar) */
	void *context;

	/* Registers memory and stores a handle of your choice, such as a struct ibv_mr *. Returns
	 * 0, or a negative error number if it has registered nothing. After -ENOMEM, -EAGAIN or
	 * -ENOSPC the cache evicts a region and tries once more. */
	int (*register_region)(void *context, void *address, size_t length, void **handle);
	/* Deregisters a region. Called once for each handle, when no lease uses the region any
	 * more. Cannot fail. */
	void (*deregister_region)(void *context, void *address, size_t length, void *handle);

	uint64_t flags; /* MMUN_REGISTRAR_* */
};

#define MMUN_MERGE_OVERLAPPING 0u /* One region for requests that overlap. */
#define MMUN_MERGE_NEVER 1u       /* A region of its own for each request. */
#define MMUN_MERGE_ADJACENT 2u    /* One region for requests that overlap or are adjacent. */

struct mmun_regcache_options {
	size_t size;               /* sizeof(struct mmun_regcache_options) */
	uint32_t merge;            /* MMUN_MERGE_* */
	uint32_t max_regions;      /* 0: 65536 */
	uint64_t max_bytes;        /* 0: no limit */
	uint64_t max_region_bytes; /* Largest region that merging makes. 0: 1 GiB */
};

/* A lease of a region, in the caller's memory. The caller may move the struct, and another thread
 * may put the lease. A lease and its copy must not both be put. */
struct mmun_lease {
	void *handle; /* The handle that register_region has stored. */
	size_t mmun_private[2];
};

/* Opens a cache for this process's memory. If `options` is NULL, every option is zero. The library
 * copies `registrar`. -EINVAL, -E2BIG: the registrar or the options are wrong. -ENOMEM: no memory
 * for the tables. -EDEADLK in a callback or inside an invalidation. -ESRCH: `mmun` is the parent's. */
int mmun_regcache_open(const struct mmun *mmun, const struct mmun_registrar *registrar,
		       const struct mmun_regcache_options *options, struct mmun_regcache **cache);

/* Deregisters every region and ends the cache: after the function has returned 0, the library does
 * not call the registrar any more. For NULL the function does nothing. No other thread may use the
 * cache meanwhile. Returns -EBUSY if a lease has not been put, and -EDEADLK in a callback or inside
 * an invalidation, of any address space; in both cases the cache stays open. */
int mmun_regcache_close(struct mmun_regcache *cache);

/*
 * Leases a region that covers the bytes, and registers one if there is none. A hit takes some ten
 * nanoseconds and no lock.
 *
 * The region stays registered until mmun_regcache_put(), even if its memory changes. After a change
 * mmun_lease_valid() returns false, and no later mmun_regcache_get() finds the region.
 *
 * An error of the registrar is returned as it is. -ENOSPC: every region in the full cache is
 * leased. -EFBIG: the request is larger than max_bytes. -EINVAL: the range is empty or wraps.
 * -ESRCH: the cache is the parent's. -EMFILE: a limit of open files, with the kernel source.
 * -EDEADLK: a miss in a callback of the
 * kernel source, or a request that would wait for its own thread. After an error the lease is
 * empty.
 */
int mmun_regcache_get(const struct mmun_regcache *cache, void *address, size_t length, struct mmun_lease *lease);

/* Ends a lease. If the lease was already put, or `lease` is NULL or empty, the function ends the
 * process with a message. */
void mmun_regcache_put(struct mmun_lease *lease);

/*
 * Returns true if the region is current: the device reaches the memory that the program has at the
 * region's addresses. Call this function after a transfer: true means that the transfer used that
 * memory.
 *
 * After false, repeat the transfer with a new lease, because it may have used other memory. There
 * are four reasons for false:
 *
 * - The memory was unmapped or changed during the lease, perhaps because the program frees memory
 *   that is in use.
 * - mmun_regcache_flush() removed the region. No memory was lost.
 * - A larger region replaced this one. No memory was lost.
 * - A change of the same addresses was under way in another thread when the lease began: that
 *   thread's munmap() had not returned, but the kernel had already given the addresses to this
 *   thread. No memory was lost.
 *
 * The function also returns false for NULL and for a lease that was put.
 */
bool mmun_lease_valid(const struct mmun_lease *lease);

/* Returns the range of the region, which may be larger than the range that was requested. */
int mmun_lease_range(const struct mmun_lease *lease, void **address, size_t *length);

/* Removes every region from the cache and deregisters those without a lease. Returns how many
 * regions it removed. */
uint64_t mmun_regcache_flush(const struct mmun_regcache *cache);

/* Deregisters the regions that callbacks have removed from the cache. A miss and a put deregister
 * them as well. So call this function only if the program has neither for a long time. */
void mmun_regcache_reap(const struct mmun_regcache *cache);

struct mmun_regcache_stats {
	size_t size;           /* sizeof(struct mmun_regcache_stats) */
	uint64_t hits;         /* Requests that found a region. */
	uint64_t misses;       /* Requests that found none. */
	uint64_t waits;        /* Requests that waited while another thread registered. */
	uint64_t registered;   /* Calls of register_region that succeeded. */
	uint64_t deregistered; /* Calls of deregister_region. */
	uint64_t failed;       /* Registrations that register_region or the kernel source refused. */
	uint64_t invalidated;  /* Regions removed because their memory changed. */
	uint64_t replaced;     /* Regions removed because a larger one replaced them. */
	uint64_t evicted;      /* Regions removed to make room. */
	uint64_t flushed;      /* Regions removed by mmun_regcache_flush(). */
	uint64_t collisions;   /* Registrations repeated because a change raced with them. */
	uint64_t lost;         /* Records that the kernel source lost. Each loss removes all regions. */
	uint64_t regions;      /* Regions that are registered now, */
	uint64_t bytes;        /* and their bytes. */
	uint64_t live_regions; /* Those of them that a look-up finds, */
	uint64_t live_bytes;   /* and their bytes. */
};

/* Writes the counters of the cache to `stats`. */
int mmun_regcache_stats(const struct mmun_regcache *cache, struct mmun_regcache_stats *stats);

#ifdef __cplusplus
}
#endif

#endif
