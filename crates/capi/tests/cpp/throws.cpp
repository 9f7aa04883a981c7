// Exceptions that leave callbacks: the argument names the callback.
#include <mmun/mmu_notifier.h>
#include <mmun/mmun.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace {

[[noreturn]] void fail()
{
	throw std::runtime_error("a bug of the program");
}

void start(void *, const struct mmun_change *) { fail(); }
void nothing(void *, const struct mmun_change *) {}
int refuse(void *, void *, std::size_t, void **) { fail(); }
int accept(void *, void *, std::size_t, void **) { return 0; }
void fail_to_undo(void *, void *, std::size_t, void *) { fail(); }
void undo(void *, void *, std::size_t, void *) {}
int notifier_start(struct mmu_notifier *, const struct mmu_notifier_range *) { fail(); }
bool interval(struct mmu_interval_notifier *, const struct mmu_notifier_range *, unsigned long) { fail(); }

struct mmu_notifier *no_notifier(struct mm_struct *) { fail(); }
void no_free(struct mmu_notifier *) { fail(); }
struct mmu_notifier_range kept_open;

// Opens an invalidation, so the notifier cannot be registered, and the library frees it at once.
struct mmu_notifier *opening_notifier(struct mm_struct *mm)
{
	static struct mmu_notifier notifier = {};

	mmu_notifier_range_init(&kept_open, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mm, 0x1000, 0x2000);
	mmu_notifier_invalidate_range_start(&kept_open);
	return &notifier;
}

void change(struct mm_struct *mm)
{
	struct mmu_notifier_range range;

	mmu_notifier_range_init(&range, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mm, 0x1000, 0x2000);
	mmu_notifier_invalidate_range_start(&range);
	mmu_notifier_invalidate_range_end(&range);
}

} // namespace

int main(int argc, char **argv)
try {
	const struct mmun_options options = {sizeof(options), MMUN_SOURCE_OWN, MMUN_SOURCE_OWN};
	const char *which = argc > 1 ? argv[1] : "";
	struct mm_struct *mm = mmun_current_mm();
	struct mmun *mmun;

	if (mmun_open(&options, &mmun) < 0)
		return 1;
	if (!std::strcmp(which, "start") || !std::strcmp(which, "end")) {
		const bool at_start = !std::strcmp(which, "start");
		const struct mmun_ops ops = {sizeof(ops), at_start ? start : nothing, at_start ? nothing : start};
		struct mmun_subscription *subscription;

		if (mmun_subscribe(mmun, &ops, nullptr, &subscription) < 0)
			return 1;
		change(mm);
	} else if (!std::strcmp(which, "register") || !std::strcmp(which, "deregister")) {
		const bool at_register = !std::strcmp(which, "register");
		const struct mmun_registrar registrar = {sizeof(registrar), nullptr, at_register ? refuse : accept,
							 at_register ? undo : fail_to_undo, 0};
		struct mmun_regcache *cache;
		struct mmun_lease lease;

		if (mmun_regcache_open(mmun, &registrar, nullptr, &cache) < 0)
			return 1;
		mmun_regcache_get(cache, mm, 1, &lease);
		mmun_regcache_put(&lease);
		mmun_regcache_flush(cache);
	} else if (!std::strcmp(which, "notifier")) {
		static struct mmu_notifier_ops ops = {};
		static struct mmu_notifier notifier = {};

		ops.invalidate_range_start = notifier_start;
		notifier.ops = &ops;
		if (mmu_notifier_register(&notifier, mm) < 0)
			return 1;
		change(mm);
	} else if (!std::strcmp(which, "alloc") || !std::strcmp(which, "free") || !std::strcmp(which, "free at once")) {
		static struct mmu_notifier_ops ops = {};
		static struct mmu_notifier notifier = {};

		ops.alloc_notifier = !std::strcmp(which, "alloc") ? no_notifier : opening_notifier;
		ops.free_notifier = no_free;
		if (std::strcmp(which, "free")) {
			mmu_notifier_get(&ops, mm);
			return 3;
		}
		notifier.ops = &ops;
		if (mmu_notifier_register(&notifier, mm) < 0)
			return 1;
		mmu_notifier_put(&notifier);
		mmu_notifier_synchronize();
	} else {
		static const struct mmu_interval_notifier_ops ops = {interval};
		static struct mmu_interval_notifier notifier;

		if (mmu_interval_notifier_insert(&notifier, mm, 0x1000, 0x1000, &ops) < 0)
			return 1;
		change(mm);
	}
	return 0;
} catch (const std::exception &) {
	return 2; // The exception has passed through the library, which must not happen.
}
