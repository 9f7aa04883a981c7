/* Loops over functions of libmmun.so, which is loaded by dlopen(), as C programs may load it. */
#include <mmun/mmu_notifier.h>
#include <mmun/mmun.h>

#include <dlfcn.h>
#include <stdint.h>
#include <time.h>

#define FUNCTIONS(F)                                                                                 \
	F(mmun_get) F(mmun_put) F(mmun_mm_new) F(mmun_invalidate_range_start)                        \
	F(mmun_invalidate_range_end) F(mmun_open) F(mmun_watch) F(mmun_watch_valid)                  \
	F(mmun_regcache_open) F(mmun_regcache_get) F(mmun_regcache_put) F(mmun_subscribe)            \
	F(mmun_unsubscribe) F(mmun_current_mm) F(mmun_unwatch)

#define DECLARE(name) static __typeof__(name) *p_##name;
FUNCTIONS(DECLARE)

static int start(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	(void)mn;
	(void)range;
	return 0;
}

static void end(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	(void)mn;
	(void)range;
}

static struct mmu_notifier notifier;

static struct mmu_notifier *alloc(struct mm_struct *mm)
{
	(void)mm;
	return &notifier;
}

static const struct mmu_notifier_ops ops = {
	.invalidate_range_start = start, .invalidate_range_end = end, .alloc_notifier = alloc};

static void changed(void *context, const struct mmun_change *change)
{
	(void)context;
	(void)change;
}

static int reg(void *context, void *address, size_t length, void **handle)
{
	(void)context;
	(void)length;
	*handle = address;
	return 0;
}

static void dereg(void *context, void *address, size_t length, void *handle)
{
	(void)context;
	(void)address;
	(void)length;
	(void)handle;
}

static struct mm_struct *mm;
static struct mmun_watch *watch;
static struct mmun_regcache *cache;
static struct mmun *mmun;
static struct mmun_subscription *subscription;

/* Loads the library. Returns the nanoseconds of dlopen(), or a negative number on failure. */
double capi_load(const char *path)
{
	struct timespec before, after;
	void *library;

	clock_gettime(CLOCK_MONOTONIC, &before);
	library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	clock_gettime(CLOCK_MONOTONIC, &after);
	if (!library)
		return -1;
#define LOOK(name)                                                                                   \
	*(void **)&p_##name = dlsym(library, #name);                                                 \
	if (!p_##name)                                                                               \
		return -2;
	FUNCTIONS(LOOK)
	return (double)(after.tv_sec - before.tv_sec) * 1e9 + (double)(after.tv_nsec - before.tv_nsec);
}

int capi_prepare(void *buffer, size_t length, uint32_t source)
{
	const struct mmun_options options = {sizeof(options), source, source};
	const struct mmun_registrar registrar = {sizeof(registrar), NULL, reg, dereg, 0};
	struct mmu_notifier *got;

	mm = p_mmun_mm_new();
	got = p_mmun_get(&ops, mm);
	if (IS_ERR(got) || p_mmun_open(&options, &mmun) < 0)
		return -1;
	if (p_mmun_watch(mmun, buffer, length, &watch) < 0)
		return -2;
	return p_mmun_regcache_open(mmun, &registrar, NULL, &cache);
}

void capi_get_put(uint32_t calls)
{
	while (calls--)
		p_mmun_put(p_mmun_get(&ops, mm));
}

static void bracket(struct mm_struct *of, uint32_t calls)
{
	struct mmu_notifier_range range;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, of, 0x1000, 0x2000);
	while (calls--) {
		p_mmun_invalidate_range_start(&range);
		p_mmun_invalidate_range_end(&range);
	}
}

void capi_bracket(uint32_t calls)
{
	bracket(mm, calls);
}

/* Brackets on mmun_current_mm(), with the subscribers of the watch and of the cache. */
void capi_current(uint32_t calls)
{
	bracket(p_mmun_current_mm(), calls);
}

int capi_subscribe(void)
{
	const struct mmun_ops table = {sizeof(table), changed, changed};

	return p_mmun_subscribe(mmun, &table, NULL, &subscription);
}

int capi_unsubscribe(void)
{
	return p_mmun_unsubscribe(subscription);
}

uint32_t capi_watch_valid(uint32_t calls)
{
	uint32_t valid = 0;

	while (calls--)
		valid += p_mmun_watch_valid(watch);
	return valid;
}

uintptr_t capi_regcache(void *buffer, size_t length, uint32_t calls)
{
	struct mmun_lease lease;
	uintptr_t sum = 0;

	while (calls--) {
		if (p_mmun_regcache_get(cache, buffer, length, &lease) < 0)
			return 0;
		sum += (uintptr_t)lease.handle;
		p_mmun_regcache_put(&lease);
	}
	return sum;
}
