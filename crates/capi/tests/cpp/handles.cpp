// Tests the promises of mmun.hpp beyond mmun.h, with brackets that the program opens.
#include <mmun/mmu_notifier.h>
#include <mmun/mmun.hpp>

#include <atomic>
#include <cstring>
#include <string>
#include <thread>

#define WHY ""
#include "../c/checked.h"

namespace {

constexpr std::size_t page = 4096;
alignas(page) char memory[4 * page];

// A bracket over `memory`: open until it is destroyed.
class Change {
public:
	Change()
	{
		const unsigned long start = reinterpret_cast<std::uintptr_t>(memory);

		mmu_notifier_range_init(&range_, MMU_NOTIFY_CLEAR, MMU_NOTIFIER_RANGE_BLOCKABLE, mmun_current_mm(), start,
					start + sizeof(memory));
		mmu_notifier_invalidate_range_start(&range_);
	}
	~Change() { mmu_notifier_invalidate_range_end(&range_); }
	Change(const Change &) = delete;
	Change &operator=(const Change &) = delete;

private:
	struct mmu_notifier_range range_;
};

// A mutex that records whether it is locked.
struct Mutex {
	void lock() { CHECK(!locked); locked = true; }
	void unlock() { CHECK(locked); locked = false; }
	bool locked = false;
};

int held; // Number of registrations.

// A registration, which the destructor undoes.
class Key {
public:
	Key() : owns_(true) { ++held; }
	Key(Key &&other) noexcept : owns_(other.owns_) { other.owns_ = false; }
	~Key() { held -= owns_ ? 1 : 0; }
	Key(const Key &) = delete;
	Key &operator=(const Key &) = delete;

private:
	bool owns_;
};

void an_error_says_its_text_once(const mmu::Sources &mmun)
{
	try {
		mmu::Watch nothing(mmun, memory, 0);
		CHECK(!"an empty range was watched");
	} catch (const std::system_error &error) {
		CHECK(error.code() == std::errc::invalid_argument);
		CHECK(std::string(error.what()) == mmun_last_error());
		const std::system_error &same = error;
		const mmu::Error copy = dynamic_cast<const mmu::Error &>(same);
		CHECK(!std::strcmp(copy.what(), error.what()) && copy.code() == error.code());
	}
}

// A registration is entered only if no change raced with it. Any other registration is undone,
// without the lock.
void a_fill_enters_only_registrations_without_a_race(const mmu::Sources &mmun)
{
	Mutex mutex;
	std::unique_ptr<Key> entered;
	int made = 0;

	mmun.fill(
	    mutex,
	    [&] {
		    CHECK(held == 0 && !mutex.locked);
		    if (++made < 3)
			    Change();
		    return std::unique_ptr<Key>(new Key);
	    },
	    [&](std::unique_ptr<Key> key) {
		    CHECK(made == 3 && mutex.locked);
		    entered = std::move(key);
	    });
	CHECK(made == 3 && held == 1 && !mutex.locked);
	entered.reset();
}

void a_fill_that_throws_leaves_nothing(const mmu::Sources &mmun)
{
	Mutex mutex;

	for (const bool in_make : {true, false}) {
		try {
			mmun.fill(
			    mutex,
			    [&] {
				    Key key;
				    if (in_make)
					    throw 1;
				    return key;
			    },
			    [](Key) { throw 1; });
			CHECK(!"it did not throw");
		} catch (int) {
			CHECK(held == 0 && !mutex.locked);
		}
	}
}

void a_fill_inside_a_change_says_so(const mmu::Sources &mmun)
{
	const Change change;
	Mutex mutex;

	try {
		mmun.fill(mutex, [] { return 1; }, [](int) {});
		CHECK(!"it was filled");
	} catch (const mmu::Error &error) {
		CHECK(error.code() == std::errc::resource_deadlock_would_occur);
	}
}

int registrations;

int register_region(void *, void *address, std::size_t, void **handle)
{
	++registrations;
	*handle = address;
	return 0;
}

void deregister_region(void *, void *, std::size_t, void *)
{
	--registrations;
}

// mmun_lease_valid() returns false although the program has done nothing wrong, as mmun.h warns.
void a_lease_got_during_a_change_is_not_valid(const mmu::Sources &mmun)
{
	const struct mmun_registrar registrar = {sizeof(registrar), nullptr, register_region, deregister_region, 0};
	{
		const mmu::RegCache cache(mmun, registrar);

		{
			const Change change;
			std::thread([&] {
				const mmu::Lease lease = cache.lease(memory, sizeof(memory));
				CHECK(!lease.valid() && lease.handle() == memory);
			}).join();
		}
		mmu::Lease lease = cache.lease(memory, sizeof(memory));
		CHECK(lease.valid());
		cache.flush();
		CHECK(!lease.valid());
		lease = cache.lease(memory, sizeof(memory));
		CHECK(lease.valid());
		const mmu::Lease moved = std::move(lease);
		CHECK(moved.valid() && !lease.valid());
	}
	CHECK(registrations == 0);
}

} // namespace

int main()
{
	const mmu::Sources mmun(MMUN_SOURCE_OWN);

	an_error_says_its_text_once(mmun);
	a_fill_enters_only_registrations_without_a_race(mmun);
	a_fill_that_throws_leaves_nothing(mmun);
	a_fill_inside_a_change_says_so(mmun);
	a_lease_got_during_a_change_is_not_valid(mmun);
	return 0;
}
