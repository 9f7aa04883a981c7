/*
 * A driver in the kernel's style, with two devices that share one notifier for each address space.
 *
 * Each device that is opened gets the notifier of the address space: the first mmu_notifier_get()
 * makes the notifier, the second mmu_notifier_get() finds it. After the last put, when no callback
 * uses the notifier any more, the library frees the notifier. Before the driver is unloaded, it
 * waits for that free with mmu_notifier_synchronize().
 */
#include <mmun/mmu_notifier.h>

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define ENTRIES 64ul
#define PAGE 4096ul

/* The driver's object for one address space. */
struct space {
	pthread_mutex_t lock;
	bool mapped[ENTRIES];
	unsigned long flushed;
	struct mmu_notifier mn; /* A field of the driver's object, as in the kernel. */
};

static int made, freed;

static struct mmu_notifier *alloc_notifier(struct mm_struct *mm)
{
	struct space *space = calloc(1, sizeof(*space));

	(void)mm;
	if (!space)
		return ERR_PTR(-ENOMEM);
	pthread_mutex_init(&space->lock, NULL);
	made++;
	return &space->mn;
}

static void free_notifier(struct mmu_notifier *mn)
{
	struct space *space = container_of(mn, struct space, mn);

	pthread_mutex_destroy(&space->lock);
	free(space);
	__atomic_add_fetch(&freed, 1, __ATOMIC_RELAXED);
}

static int invalidate_range_start(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	struct space *space = container_of(mn, struct space, mn);

	if (!mmu_notifier_range_blockable(range)) {
		if (pthread_mutex_trylock(&space->lock) != 0)
			return -EAGAIN;
	} else {
		pthread_mutex_lock(&space->lock);
	}
	for (unsigned long page = range->start / PAGE; page < range->end / PAGE && page < ENTRIES; page++) {
		space->flushed += space->mapped[page];
		space->mapped[page] = false;
	}
	pthread_mutex_unlock(&space->lock);
	return 0;
}

static void release(struct mmu_notifier *mn, struct mm_struct *mm)
{
	struct space *space = container_of(mn, struct space, mn);

	(void)mm;
	pthread_mutex_lock(&space->lock);
	for (unsigned long page = 0; page < ENTRIES; page++)
		space->mapped[page] = false;
	pthread_mutex_unlock(&space->lock);
}

static const struct mmu_notifier_ops ops = {
	.release = release,
	.invalidate_range_start = invalidate_range_start,
	.alloc_notifier = alloc_notifier,
	.free_notifier = free_notifier,
};

struct device {
	struct space *space;
};

static int device_open(struct device *device, struct mm_struct *mm)
{
	struct mmu_notifier *mn = mmu_notifier_get(&ops, mm);

	if (IS_ERR(mn))
		return (int)PTR_ERR(mn);
	device->space = container_of(mn, struct space, mn);
	return 0;
}

static void device_map(struct device *device, unsigned long page)
{
	pthread_mutex_lock(&device->space->lock);
	device->space->mapped[page] = true;
	pthread_mutex_unlock(&device->space->lock);
}

static void device_close(struct device *device)
{
	mmu_notifier_put(&device->space->mn);
	device->space = NULL;
}

static void driver_unload(void)
{
	mmu_notifier_synchronize();
	assert(made == freed);
}

int main(void)
{
	struct mm_struct *mm = mmun_mm_new(); /* A guest's, for example; mmun_current_mm() is this process's own. */
	struct mmu_notifier_range range;
	struct device first = {NULL}, second = {NULL};

	if (device_open(&first, mm) != 0 || device_open(&second, mm) != 0)
		return 1;
	if (first.space != second.space || made != 1)
		return 1; /* The devices share one space. */
	device_map(&first, 3);
	device_map(&second, 4);

	/* The guest unmaps pages 3 and 4. */
	mmu_notifier_range_init(&range, MMU_NOTIFY_UNMAP, MMU_NOTIFIER_RANGE_BLOCKABLE, mm, 3 * PAGE, 5 * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	if (second.space->flushed != 2)
		return 1;
	mmu_notifier_invalidate_range_end(&range);

	device_close(&first);
	device_map(&second, 5); /* Page 5 is still mapped. */
	device_close(&second);
	driver_unload();
	mmput(mm);
	printf("%d made, %d freed\nok\n", made, freed);
	return 0;
}
