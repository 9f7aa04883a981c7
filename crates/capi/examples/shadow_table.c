/*
 * A shadow page table over the memory of this process, as a hypervisor or a software TLB has one.
 *
 * A walk of the real page table is slow, so the shadow table caches its result. In this example, a
 * page of a file stands for a page frame. It contains the frame's number, which the walk reads. One
 * interval covers the memory. The interval's callback empties the entries before the memory
 * changes. A thread translates all the time while main() maps other frames. The thread must never
 * get a frame that was unmapped.
 */
#define _GNU_SOURCE /* memfd_create */
#include <mmun/mmu_notifier.h>
#include <mmun/mmun.h>

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES 16ul
#define PAGE ((unsigned long)sysconf(_SC_PAGESIZE))

struct shadow {
	pthread_mutex_t lock; /* Guards the entries and the sequence. Its holders do not allocate. */
	unsigned long entries[PAGES]; /* 0: none */
	unsigned long base;
	struct mmu_interval_notifier interval;
};

/* Runs before the memory changes, perhaps in the middle of free(). */
static bool invalidate(struct mmu_interval_notifier *interval, const struct mmu_notifier_range *range,
		       unsigned long seq)
{
	struct shadow *shadow = container_of(interval, struct shadow, interval);

	if (mmu_notifier_range_blockable(range))
		pthread_mutex_lock(&shadow->lock);
	else if (pthread_mutex_trylock(&shadow->lock) != 0)
		return false;
	mmu_interval_set_seq(interval, seq);
	for (unsigned long page = 0; page < PAGES; page++) {
		unsigned long address = shadow->base + page * PAGE;

		if (range->start <= address && address < range->end)
			shadow->entries[page] = 0;
	}
	pthread_mutex_unlock(&shadow->lock);
	return true;
}

static const struct mmu_interval_notifier_ops ops = {.invalidate = invalidate};

/* The collision-retry pattern of the kernel's drivers. */
static unsigned long translate(struct shadow *shadow, unsigned long page)
{
	for (;;) {
		unsigned long entry, seq;

		pthread_mutex_lock(&shadow->lock);
		entry = shadow->entries[page];
		pthread_mutex_unlock(&shadow->lock);
		if (entry)
			return entry;

		seq = mmu_interval_read_begin(&shadow->interval);
		entry = *(volatile unsigned long *)(shadow->base + page * PAGE); /* The slow walk, */
		sched_yield(); /* so slow that main() can overtake it. */
		pthread_mutex_lock(&shadow->lock);
		if (!mmu_interval_read_retry(&shadow->interval, seq))
			shadow->entries[page] = entry;
		pthread_mutex_unlock(&shadow->lock);
	}
}

static struct shadow shadow = {.lock = PTHREAD_MUTEX_INITIALIZER};
static atomic_ulong oldest = 1; /* The frame that main() has mapped last; lower numbers are stale. */
static atomic_bool done;
static atomic_ulong walks;

static void *walk(void *argument)
{
	(void)argument;
	for (unsigned long page = 0; !done; page = (page + 1) % PAGES) {
		unsigned long least = oldest;

		if (translate(&shadow, page) < least) {
			fprintf(stderr, "a stale translation\n");
			_exit(1);
		}
		walks++;
	}
	return NULL;
}

int main(void)
{
	const struct mmun_options options = {sizeof(options), MMUN_SOURCE_HOOK, MMUN_SOURCE_HOOK};
	struct mmun *mmun;
	pthread_t thread;
	char *memory;
	int file;

	if (mmun_open(&options, &mmun) < 0) { /* This pattern needs callbacks before the change, as from the hook. */
		fprintf(stderr, "SKIP %s\n", mmun_last_error());
		return 77;
	}
	file = memfd_create("frames", 0);
	memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (file < 0 || ftruncate(file, 400 * (off_t)PAGE) != 0 || memory == MAP_FAILED)
		return 1;
	for (unsigned long frame = 0; frame < 400; frame++) {
		const unsigned long name = frame + 1;

		if (pwrite(file, &name, sizeof(name), (off_t)(frame * PAGE)) != (ssize_t)sizeof(name))
			return 1;
	}
	for (unsigned long page = 0; page < PAGES; page++)
		*(unsigned long *)(void *)(memory + page * PAGE) = 1;
	shadow.base = (unsigned long)memory;
	if (mmu_interval_notifier_insert(&shadow.interval, mmun_current_mm(), shadow.base, PAGES * PAGE, &ops) != 0)
		return 1;
	if (pthread_create(&thread, NULL, walk, NULL) != 0)
		return 1;

	for (unsigned long frame = 1; frame < 400; frame++) {
		const unsigned long before = walks;

		for (unsigned long page = 0; page < PAGES; page++)
			if (mmap(memory + page * PAGE, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, file,
				 (off_t)(frame * PAGE)) == MAP_FAILED)
				return 1;
		oldest = frame + 1; /* From here on every older frame is stale. */
		while (frame % 4 == 0 && walks - before < 2 * PAGES)
			sched_yield(); /* Wait until the thread has translated each page. */
	}
	done = true;
	pthread_join(thread, NULL);
	mmu_interval_notifier_remove(&shadow.interval);
	mmun_close(mmun);
	printf("%lu walks, none stale\nok\n", (unsigned long)walks);
	return 0;
}
