/* Intervals: B-11 to B-32 of the contract. */
#include "check.h"

static atomic_bool gone;

struct shadow {
	pthread_mutex_t lock;
	struct mmu_interval_notifier mni;
	atomic_int calls;
	enum mmu_notifier_event last_event;
	bool gated;
};

static bool invalidate(struct mmu_interval_notifier *mni, const struct mmu_notifier_range *range, unsigned long cur_seq)
{
	struct shadow *shadow = container_of(mni, struct shadow, mni);

	if (!mmu_notifier_range_blockable(range)) {
		if (pthread_mutex_trylock(&shadow->lock) != 0)
			return false;
	} else {
		pthread_mutex_lock(&shadow->lock);
	}
	mmu_interval_set_seq(mni, cur_seq);
	shadow->calls++;
	shadow->last_event = range->event;
	pthread_mutex_unlock(&shadow->lock);
	if (shadow->gated) {
		sem_post(&gate.arrived);
		while (sem_wait(&gate.open) != 0)
			;
		gone = true;
	}
	return true;
}

static const struct mmu_interval_notifier_ops interval_ops = { .invalidate = invalidate };

static struct shadow *shadow_new(void)
{
	struct shadow *shadow = calloc(1, sizeof(*shadow));

	CHECK(shadow && pthread_mutex_init(&shadow->lock, NULL) == 0);
	return shadow;
}

static struct shadow *inserted(struct mm_struct *mm, unsigned long page)
{
	struct shadow *shadow = shadow_new();

	CHECK(mmu_interval_notifier_insert(&shadow->mni, mm, page * PAGE, PAGE, &interval_ops) == 0);
	return shadow;
}

static void removed(struct shadow *shadow)
{
	mmu_interval_notifier_remove(&shadow->mni);
	free(shadow);
}

SCENARIO(b_11_b_12_what_cannot_be_inserted)
{
	struct mm_struct *mm = mmun_mm_new();
	struct shadow *shadow = shadow_new();
	struct mmu_interval_notifier *mni = &shadow->mni;

	CHECK(mmu_interval_notifier_insert(mni, mm, PAGE, 0, &interval_ops) == -EOVERFLOW);
	CHECK(mmu_interval_notifier_insert(mni, mm, ~0ul, 2, &interval_ops) == -EOVERFLOW);
	CHECK(mmu_interval_notifier_insert(mni, mm, PAGE, PAGE, NULL) == -EINVAL);
	CHECK(mmu_interval_notifier_insert(NULL, mm, PAGE, PAGE, &interval_ops) == -EINVAL);
	CHECK(mmu_interval_notifier_insert_locked(mni, mm, PAGE, PAGE, &interval_ops) == -EINVAL);
	CHECK(mmu_interval_notifier_insert(mni, mm, ~0ul, 1, &interval_ops) == 0);
	CHECK(mni->interval_tree.start == ~0ul && mni->interval_tree.last == ~0ul && mni->mm == mm);
	mmu_interval_notifier_remove(mni);
#ifdef __aarch64__
	/* An address of tagged memory. */
	CHECK(mmu_interval_notifier_insert(mni, mm, 0x0bul << 56 | PAGE, PAGE, &interval_ops) == 0);
	CHECK(mni->interval_tree.start == PAGE);
	event(mm, 1);
	CHECK(shadow->calls == 1);
	mmu_interval_notifier_remove(mni);
#endif
	mmgrab(mm);
	mmput(mm);
	CHECK(mmu_interval_notifier_insert(mni, mm, PAGE, PAGE, &interval_ops) == -EINVAL);
	free(shadow);
	mmdrop(mm);
}

SCENARIO(b_13_b_14_b_32_the_sequence)
{
	struct mm_struct *mm = mmun_mm_new();
	struct shadow *shadow = inserted(mm, 7);
	unsigned long seq = mmu_interval_read_begin(&shadow->mni);

	CHECK(seq % 2 == 1 && !mmu_interval_read_retry(&shadow->mni, seq));
	event(mm, 6);
	event(mm, 8);
	CHECK(shadow->calls == 0 && !mmu_interval_check_retry(&shadow->mni, seq));
	event(mm, 7);
	CHECK(shadow->calls == 1 && mmu_interval_check_retry(&shadow->mni, seq));
	seq = mmu_interval_read_begin(&shadow->mni);
	CHECK(!mmu_interval_read_retry(&shadow->mni, seq));
	removed(shadow);
	mmap_write_lock(mm);
	shadow = shadow_new();
	CHECK(mmu_interval_notifier_insert_locked(&shadow->mni, mm, PAGE, PAGE, &interval_ops) == 0);
	mmap_write_unlock(mm);
	removed(shadow);
	mmput(mm);
}

static void open_window(struct mmu_notifier_range *range, struct mm_struct *mm, unsigned long page)
{
	mmu_notifier_range_init(range, MMU_NOTIFY_CLEAR, 0, mm, page * PAGE, (page + 1) * PAGE);
	mmu_notifier_invalidate_range_start(range);
}

SCENARIO(b_15_b_16_b_17_inserts_under_an_invalidation)
{
	struct mm_struct *mm = mmun_mm_new();
	struct shadow *first = inserted(mm, 1), *partial, *full, *never;
	struct mmu_notifier_range range, inner;
	unsigned long seq;

	open_window(&range, mm, 9); /* This range contains no interval. */
	partial = inserted(mm, 2);
	CHECK(mmu_interval_read_begin(&partial->mni) == 0); /* Waiting would deadlock. */
	CHECK(mmu_interval_read_retry(&partial->mni, 0));
	full = inserted(mm, 3);
	never = inserted(mm, 3);
	removed(never);
	open_window(&inner, mm, 3);
	CHECK(full->calls == 0);
	mmu_notifier_invalidate_range_end(&inner);
	mmu_notifier_invalidate_range_end(&range);
	seq = mmu_interval_read_begin(&full->mni);
	CHECK(!mmu_interval_read_retry(&full->mni, seq));
	event(mm, 3);
	CHECK(full->calls == 1 && partial->calls == 0);
	removed(first);
	removed(partial);
	removed(full);
	mmput(mm);
}

SCENARIO(b_18_b_19_refusals)
{
	struct mm_struct *mm = mmun_mm_new();
	struct shadow *shadow = inserted(mm, 1), *later;
	struct probe *probe = got(mm, &ops, 1);
	struct mmu_notifier_range range;
	unsigned long seq;

	probe->refuse = -EAGAIN;
	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE);
	CHECK(mmu_notifier_invalidate_range_start_nonblock(&range) == -EAGAIN && shadow->calls == 1);
	later = inserted(mm, 1); /* The kernel loses an end here, and then the next two lines hang. */
	seq = mmu_interval_read_begin(&later->mni);
	CHECK(!mmu_interval_read_retry(&later->mni, seq));
	removed(later);
	probe->refuse = 0;
	pthread_mutex_lock(&shadow->lock);
	CHECK(mmu_notifier_invalidate_range_start_nonblock(&range) == -EAGAIN && probe->count[START] == 1);
	pthread_mutex_unlock(&shadow->lock);
	seq = mmu_interval_read_begin(&shadow->mni);
	CHECK(!mmu_interval_read_retry(&shadow->mni, seq));
	removed(shadow);
	mmu_notifier_put(&probe->mn);
	mmput(mm);
}

static void *tell_page_1(void *mm)
{
	event(mm, 1);
	return NULL;
}

static void *remove_shadow(void *shadow)
{
	mmu_interval_notifier_remove(&((struct shadow *)shadow)->mni);
	CHECK(gone);
	return NULL;
}

static void removes_inside(void)
{
	struct mm_struct *mm = mmun_mm_new();
	struct shadow *shadow = inserted(mm, 1);
	struct mmu_notifier_range range;

	open_window(&range, mm, 1);
	mmu_interval_notifier_remove(&shadow->mni);
}

SCENARIO(b_20_b_22_remove_waits_for_the_callback)
{
	struct mm_struct *mm = mmun_mm_new();
	struct shadow *shadow = inserted(mm, 1);
	pthread_t telling, removing;

	gate_reset();
	gone = false;
	shadow->gated = true;
	telling = spawn(tell_page_1, mm);
	sem_wait(&gate.arrived);
	removing = spawn(remove_shadow, shadow);
	sem_post(&gate.open);
	join(removing);
	join(telling);
	event(mm, 1);
	CHECK(shadow->calls == 1);
	free(shadow);
	mmput(mm);
	CHECK(aborts(removes_inside));
}

SCENARIO(b_10_b_28_b_29_exit)
{
	struct mm_struct *mm = mmun_mm_new();
	struct shadow *shadow = inserted(mm, 1);
	unsigned long seq = mmu_interval_read_begin(&shadow->mni);

	mmput(mm); /* The interval still has a handle, so `mm` stays valid. */
	CHECK(shadow->calls == 1 && shadow->last_event == MMU_NOTIFY_RELEASE);
	CHECK(mmu_interval_read_retry(&shadow->mni, seq) && !mmget_not_zero(shadow->mni.mm));
	seq = mmu_interval_read_begin(&shadow->mni);
	CHECK(!mmu_interval_read_retry(&shadow->mni, seq));
	event(shadow->mni.mm, 1);
	CHECK(shadow->calls == 2);
	removed(shadow);
}

static atomic_bool done;
static struct shadow *contended;
static atomic_long page_version, installed;

static void *fault(void *argument)
{
	(void)argument;
	while (!done) {
		unsigned long seq = mmu_interval_read_begin(&contended->mni);
		long version = page_version;

		pthread_mutex_lock(&contended->lock);
		if (!mmu_interval_read_retry(&contended->mni, seq))
			installed = version;
		pthread_mutex_unlock(&contended->lock);
	}
	return NULL;
}

SCENARIO(b_25_no_fault_installs_what_has_moved)
{
	struct mm_struct *mm = mmun_mm_new();
	struct mmu_notifier_range range;
	pthread_t faulting;
	int i;

	contended = inserted(mm, 1);
	done = false;
	faulting = spawn(fault, NULL);
	for (i = 0; i < 20000; i++) {
		open_window(&range, mm, 1);
		pthread_mutex_lock(&contended->lock);
		installed = -1;
		pthread_mutex_unlock(&contended->lock);
		page_version++;
		mmu_notifier_invalidate_range_end(&range);
		pthread_mutex_lock(&contended->lock);
		CHECK(installed == -1 || installed == page_version);
		pthread_mutex_unlock(&contended->lock);
	}
	done = true;
	join(faulting);
	removed(contended);
	mmput(mm);
}

static void *remove_one(void *shadow)
{
	removed(shadow);
	return NULL;
}

SCENARIO(b_23_remove_does_not_wait_for_what_met_no_interval)
{
	struct mm_struct *mm = mmun_mm_new();
	struct shadow *shadow = inserted(mm, 1);
	struct mmu_notifier_range range;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mm, 5 * PAGE, 6 * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	join(spawn(remove_one, shadow));
	mmu_notifier_invalidate_range_end(&range);
	mmput(mm);
}

static void *insert_first(void *mm)
{
	return inserted(mm, 1);
}

/* An invalidation that began before the first insert has not counted itself as a window of the
 * intervals. So its end must not decrement their count. */
SCENARIO(b_30_the_first_insert_beside_an_invalidation)
{
	struct mm_struct *mm = mmun_mm_new();
	struct mmu_notifier_range range;
	void *first;
	pthread_t inserting;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mm, PAGE, 2 * PAGE);
	mmu_notifier_invalidate_range_start(&range);
	inserting = spawn(insert_first, mm);
	mmu_notifier_invalidate_range_end(&range);
	CHECK(pthread_join(inserting, &first) == 0);
	event(mm, 1);
	CHECK(((struct shadow *)first)->calls == 1);
	CHECK(!mmu_interval_read_retry(&((struct shadow *)first)->mni,
				       mmu_interval_read_begin(&((struct shadow *)first)->mni)));
	removed(first);
	mmput(mm);
}

void intervals(void)
{
	RUN(b_11_b_12_what_cannot_be_inserted);
	RUN(b_13_b_14_b_32_the_sequence);
	RUN(b_15_b_16_b_17_inserts_under_an_invalidation);
	RUN(b_18_b_19_refusals);
	RUN(b_20_b_22_remove_waits_for_the_callback);
	RUN(b_10_b_28_b_29_exit);
	RUN(b_25_no_fault_installs_what_has_moved);
	RUN(b_23_remove_does_not_wait_for_what_met_no_interval);
	RUN(b_30_the_first_insert_beside_an_invalidation);
}
