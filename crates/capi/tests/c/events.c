/* Start, end, events, young, secondary TLBs: S-100 to S-106 and B-01 to B-10 of the contract. */
#include "check.h"

static void init(struct mmu_notifier_range *range, struct mm_struct *mm)
{
	mmu_notifier_range_init(range, MMU_NOTIFY_UNMAP, 0, mm, PAGE, 2 * PAGE);
}

SCENARIO(s_100_s_101_newest_first)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *one, *two;

	event(mm, 1); /* No subscriber. */
	one = got(mm, &ops, 1);
	two = got(mm, &other_ops, 2);
	forget();
	event(mm, 7);
	CHECK(names(START) == 21 && names(END) == 21);
	CHECK(one->last_start == 7 * PAGE && one->last_end == 8 * PAGE && one->last_event == MMU_NOTIFY_CLEAR);
	CHECK(one->last_blockable && two->last_owner == NULL);
	mmu_notifier_put(&one->mn);
	mmu_notifier_put(&two->mn);
	mmput(mm);
}

SCENARIO(s_102_an_error_for_a_blockable_range_is_a_warning)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *one = got(mm, &ops, 1), *two = got(mm, &other_ops, 2);

	two->refuse = -EAGAIN;
	event(mm, 1);
	CHECK(one->count[START] == 1 && one->count[END] == 1 && two->count[END] == 1);
	mmu_notifier_put(&one->mn);
	mmu_notifier_put(&two->mn);
	mmput(mm);
}

SCENARIO(s_103_b_01_b_03_b_04_a_refusal_is_undone)
{
	struct mm_struct *mm = mmun_mm_new();
	const struct mmu_notifier_ops third = ops;
	struct probe *one = got(mm, &ops, 1), *two = got(mm, &other_ops, 2), *three = got(mm, &third, 3);
	struct mmu_notifier_range range;

	two->refuse = -EAGAIN;
	forget();
	init(&range, mm);
	CHECK(mmu_notifier_invalidate_range_start_nonblock(&range) == -EAGAIN);
	CHECK(names(START) == 321 && names(END) == 31 && !one->last_blockable);
	mmu_notifier_invalidate_range_end(&range); /* The start has failed, so this does nothing. */
	CHECK(names(END) == 31);
	two->refuse = -EIO;
	CHECK(mmu_notifier_invalidate_range_start_nonblock(&range) == -EAGAIN);
	two->refuse = 0;
	forget();
	CHECK(mmu_notifier_invalidate_range_start_nonblock(&range) == 0);
	mmu_notifier_invalidate_range_end(&range);
	CHECK(names(END) == 321);
	mmu_notifier_put(&one->mn);
	mmu_notifier_put(&two->mn);
	mmu_notifier_put(&three->mn);
	mmu_notifier_synchronize();
	mmput(mm);
}

SCENARIO(s_104_young_asks_all_and_test_young_the_first)
{
	struct mm_struct *mm = mmun_mm_new();
	const struct mmu_notifier_ops second = ops;
	struct probe *one = got(mm, &ops, 1), *two = got(mm, &second, 2);

	CHECK(mmu_notifier_clear_young(mm, PAGE, 2 * PAGE) == 0 && mmu_notifier_test_young(mm, PAGE) == 0);
	one->refuse = two->refuse = 7;
	forget();
	CHECK(mmu_notifier_clear_flush_young(mm, PAGE, 2 * PAGE) == 1 && names(YOUNG) == 21);
	CHECK(mmu_notifier_clear_young(mm, PAGE, 2 * PAGE) == 1 && names(YOUNG) == 2121);
	CHECK(mmu_notifier_test_young(mm, PAGE) == 1 && names(YOUNG) == 21212);
	CHECK(mmu_notifier_clear_young(mm, PAGE, PAGE) == 0 && mmu_notifier_clear_young(NULL, 0, PAGE) == 0);
	mmu_notifier_put(&one->mn);
	mmu_notifier_put(&two->mn);
	mmu_notifier_synchronize();
	mmput(mm);
}

SCENARIO(b_06_b_07_secondary_tlbs)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = probe_new(1, &both_ops), *tlb = probe_new(2, &flush_ops);

	CHECK(mmu_notifier_register(&probe->mn, mm) == -EINVAL && !mm_has_notifiers(mm));
	free(probe);
	CHECK(mmu_notifier_register(&tlb->mn, mm) == 0);
	event(mm, 1);
	CHECK(tlb->count[FLUSH] == 0);
	mmu_notifier_arch_invalidate_secondary_tlbs(mm, PAGE, 2 * PAGE);
	CHECK(tlb->count[FLUSH] == 1);
	mmu_notifier_unregister(&tlb->mn, mm);
	free(tlb);
	mmput(mm);
}

SCENARIO(b_08_owners)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1);
	struct mmu_notifier_range range;
	int me;

	mmu_notifier_range_init_owner(&range, MMU_NOTIFY_MIGRATE, 0, mm, PAGE, 2 * PAGE, &me);
	mmu_notifier_invalidate_range_start(&range);
	mmu_notifier_invalidate_range_end(&range);
	CHECK(probe->last_event == MMU_NOTIFY_MIGRATE && probe->last_owner == &me);
	mmu_notifier_range_init_owner(&range, MMU_NOTIFY_EXCLUSIVE, 0, mm, PAGE, 2 * PAGE, &me);
	mmu_notifier_invalidate_range_start(&range);
	mmu_notifier_invalidate_range_end(&range);
	CHECK(probe->last_event == MMU_NOTIFY_EXCLUSIVE && probe->last_owner == &me);
	mmu_notifier_range_init_owner(&range, MMU_NOTIFY_CLEAR, 0, mm, PAGE, 2 * PAGE, &me);
	mmu_notifier_invalidate_range_start(&range);
	mmu_notifier_invalidate_range_end(&range);
	CHECK(probe->last_owner == NULL);
	mmu_notifier_put(&probe->mn);
	mmput(mm);
}

static void told(struct mm_struct *mm, struct probe *probe, unsigned long from, unsigned long to, unsigned long told_from,
		 unsigned long told_to)
{
	struct mmu_notifier_range range;
	int before = probe->count[START];

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, 0, mm, from, to);
	mmu_notifier_invalidate_range_start(&range);
	mmu_notifier_invalidate_range_end(&range);
	CHECK(probe->count[START] == before + (told_from != told_to) && probe->count[END] == probe->count[START]);
	CHECK(told_from == told_to || (probe->last_start == told_from && probe->last_end == told_to));
}

static void starts_twice(void)
{
	struct mmu_notifier_range range;

	init(&range, mmun_mm_new());
	mmu_notifier_invalidate_range_start(&range);
	mmu_notifier_invalidate_range_start(&range);
}

SCENARIO(s_106_bounds)
{
	struct mm_struct *mm = mmun_mm_new();
	struct probe *probe = got(mm, &ops, 1);

	told(mm, probe, PAGE, 3 * PAGE, PAGE, 3 * PAGE);
	told(mm, probe, PAGE + 1, 2 * PAGE + 1, PAGE, 3 * PAGE);
	told(mm, probe, PAGE, PAGE, 0, 0);
	told(mm, probe, 0, 0, 0, 0);
	told(mm, probe, 2 * PAGE, PAGE, 0, 0);
	told(mm, probe, 0, ~0ul, 0, ~0ul);
	told(mm, probe, ~0ul - 1, ~0ul, ~0ul & ~(PAGE - 1), ~0ul);
	mmu_notifier_put(&probe->mn);
	mmput(mm);
	CHECK(aborts(starts_twice));
}

void events(void)
{
	RUN(s_100_s_101_newest_first);
	RUN(s_102_an_error_for_a_blockable_range_is_a_warning);
	RUN(s_103_b_01_b_03_b_04_a_refusal_is_undone);
	RUN(s_104_young_asks_all_and_test_young_the_first);
	RUN(b_06_b_07_secondary_tlbs);
	RUN(b_08_owners);
	RUN(s_106_bounds);
}
