#include "check.h"

#include <sched.h>
#include <signal.h>

int order[256];
atomic_int happened, allocs, frees;
int next_name;
void (*next_hook)(struct probe *, enum at, const struct mmu_notifier_range *);
struct gate gate;

static void note(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	int place = atomic_fetch_add(&happened, 1);

	if (place < 256)
		order[place] = probe->name * 10 + (int)at;
	atomic_fetch_add(&probe->count[at], 1);
	if (probe->hook)
		probe->hook(probe, at, range);
}

struct probe *probe_of(struct mmu_notifier *mn)
{
	return container_of(mn, struct probe, mn);
}

struct probe *probe_new(int name, const struct mmu_notifier_ops *table)
{
	struct probe *probe = calloc(1, sizeof(*probe));

	CHECK(probe);
	probe->name = name;
	probe->mn.ops = table;
	return probe;
}

static struct mmu_notifier *alloc(struct mm_struct *mm)
{
	struct probe *probe = probe_new(next_name, &ops);

	CHECK(mm);
	probe->hook = next_hook;
	atomic_fetch_add(&allocs, 1);
	note(probe, ALLOC, NULL);
	return &probe->mn;
}

static struct mmu_notifier *alloc_fails(struct mm_struct *mm)
{
	(void)mm;
	return ERR_PTR(-ENODEV);
}

static void release(struct mmu_notifier *mn, struct mm_struct *mm)
{
	CHECK(mn->mm == mm);
	note(probe_of(mn), RELEASE, NULL);
}

static void remember(struct probe *probe, const struct mmu_notifier_range *range)
{
	CHECK(range->mm == probe->mn.mm);
	probe->last_start = range->start;
	probe->last_end = range->end;
	probe->last_event = range->event;
	probe->last_owner = range->owner;
	probe->last_blockable = mmu_notifier_range_blockable(range);
}

static int start(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	struct probe *probe = probe_of(mn);

	note(probe, START, range);
	if (!probe->hook)
		remember(probe, range);
	return probe->refuse;
}

static void end(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	note(probe_of(mn), END, range);
}

static int clear_young(struct mmu_notifier *mn, struct mm_struct *mm, unsigned long from, unsigned long to)
{
	CHECK(mn->mm == mm && from < to);
	note(probe_of(mn), YOUNG, NULL);
	return probe_of(mn)->refuse;
}

static int test_young(struct mmu_notifier *mn, struct mm_struct *mm, unsigned long address)
{
	return clear_young(mn, mm, address, address + 1);
}

static void flush(struct mmu_notifier *mn, struct mm_struct *mm, unsigned long from, unsigned long to)
{
	CHECK(mn->mm == mm && from < to);
	note(probe_of(mn), FLUSH, NULL);
}

static void free_probe(struct mmu_notifier *mn)
{
	struct probe *probe = probe_of(mn);

	note(probe, FREE, NULL);
	memset(probe, 0xee, sizeof(*probe));
	free(probe);
	atomic_fetch_add(&frees, 1);
}

#define TABLE                                                                                        \
	{                                                                                            \
		.release = release, .clear_flush_young = clear_young, .clear_young = clear_young,    \
		.test_young = test_young, .invalidate_range_start = start,                           \
		.invalidate_range_end = end, .alloc_notifier = alloc, .free_notifier = free_probe,   \
	}

static struct mmu_notifier *alloc_other(struct mm_struct *mm);
const struct mmu_notifier_ops ops = TABLE;
const struct mmu_notifier_ops other_ops = {
	.invalidate_range_start = start,
	.invalidate_range_end = end,
	.alloc_notifier = alloc_other,
	.free_notifier = free_probe,
};
const struct mmu_notifier_ops failing_ops = { .alloc_notifier = alloc_fails, .free_notifier = free_probe };
const struct mmu_notifier_ops flush_ops = { .arch_invalidate_secondary_tlbs = flush, .free_notifier = free_probe };
const struct mmu_notifier_ops both_ops = { .arch_invalidate_secondary_tlbs = flush, .invalidate_range_start = start };
const struct mmu_notifier_ops bare_ops = { .free_notifier = free_probe };

static struct mmu_notifier *alloc_other(struct mm_struct *mm)
{
	return alloc(mm);
}

struct probe *got(struct mm_struct *mm, const struct mmu_notifier_ops *table, int name)
{
	struct mmu_notifier *mn;

	next_name = name;
	mn = mmu_notifier_get(table, mm);
	CHECK(!IS_ERR_OR_NULL(mn));
	return probe_of(mn);
}

void event(struct mm_struct *mm, unsigned long page)
{
	struct mmu_notifier_range range;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, page * PAGE, (page + 1) * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	mmu_notifier_invalidate_range_end(&range);
}

void forget(void)
{
	atomic_store(&happened, 0);
}

long names(enum at at)
{
	long digits = 0;
	int i;

	for (i = 0; i < atomic_load(&happened) && i < 256; i++)
		if (order[i] % 10 == (int)at)
			digits = digits * 10 + order[i] / 10;
	return digits;
}

void gate_reset(void)
{
	CHECK(sem_init(&gate.arrived, 0, 0) == 0 && sem_init(&gate.open, 0, 0) == 0);
}

static void stop(void)
{
	CHECK(sem_post(&gate.arrived) == 0);
	while (sem_wait(&gate.open) != 0)
		;
}

void stop_at_start(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	(void)probe, (void)range;
	if (at == START)
		stop();
}

void stop_at_release(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	(void)probe, (void)range;
	if (at == RELEASE)
		stop();
}

void stop_at_free(struct probe *probe, enum at at, const struct mmu_notifier_range *range)
{
	(void)probe, (void)range;
	if (at == FREE)
		stop();
}

pthread_t spawn(void *(*run)(void *), void *argument)
{
	pthread_t thread;

	CHECK(pthread_create(&thread, NULL, run, argument) == 0);
	return thread;
}

void join(pthread_t thread)
{
	CHECK(pthread_join(thread, NULL) == 0);
}

static int status_of(void (*f)(void), bool quiet)
{
	int status;
	pid_t child;

	fflush(NULL);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		if (quiet)
			CHECK(freopen("/dev/null", "w", stderr));
		f();
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	return status;
}

bool aborts(void (*f)(void))
{
	int status = status_of(f, true);

	return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

bool child_succeeds(void (*f)(void))
{
	return status_of(f, false) == 0;
}

int main(void)
{
	get_put();
	life();
	events();
	intervals();
	waits();
	return 0;
}
