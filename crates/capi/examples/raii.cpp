// The handles of mmun/mmun.hpp: destructors close every handle.
#include <mmun/mmun.hpp>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <vector>

namespace {

constexpr std::size_t length = 32768;

// A mapping that the destructor unmaps.
class Mapping {
public:
	Mapping() : memory_(mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))
	{
		std::memset(memory_, 1, length);
	}
	~Mapping() { munmap(memory_, length); }
	Mapping(const Mapping &) = delete;
	Mapping &operator=(const Mapping &) = delete;
	void *get() const { return memory_; }

private:
	void *memory_;
};

// Counts the changes of one range.
class Counter {
public:
	explicit Counter(const void *memory) : address_(reinterpret_cast<std::uintptr_t>(memory)) {}
	void start(const struct mmun_change &change) noexcept
	{
		if (change.start <= address_ && address_ < change.end)
			++changes;
	}
	void end(const struct mmun_change &) noexcept {}
	std::atomic<int> changes{0};

private:
	std::uintptr_t address_;
};

int register_region(void *context, void *, std::size_t, void **handle)
{
	*handle = reinterpret_cast<void *>(static_cast<std::uintptr_t>(++*static_cast<std::atomic<int> *>(context)));
	return 0;
}

void deregister_region(void *, void *, std::size_t, void *) {}

} // namespace

int main()
try {
	mmu::Sources mmun;
	std::unique_ptr<Mapping> mapping(new Mapping);
	void *const memory = mapping->get();

	mmu::Watch watch(mmun, memory, length);
	mmu::Subscription<Counter> subscription(mmun, memory);

	std::atomic<int> registrations{0};
	const struct mmun_registrar registrar = {sizeof(registrar), &registrations, register_region, deregister_region,
						 MMUN_REGISTRAR_IN_CALLBACKS};
	const mmu::RegCache cache(mmun, registrar);
	std::vector<mmu::Lease> leases;

	for (int i = 0; i < 10; i++)
		leases.push_back(cache.lease(memory, length));
	if (registrations != 1 || !leases[0].valid() || !watch.valid())
		return 1;

	mapping.reset(); // Unmaps.
	mmun.settle();
	if (watch.valid() || leases[0].valid() || subscription->changes == 0)
		return 1;
	leases.clear();

	try {
		mmu::Watch nothing(mmun, memory, 0);
		return 1;
	} catch (const mmu::Error &error) {
		if (error.code() != std::errc::invalid_argument)
			return 1;
	}
	std::printf("%d registration, %d changes\nok\n", registrations.load(), subscription->changes.load());
	return 0;
} catch (const mmu::Error &error) {
	std::fprintf(stderr, "SKIP %s\n", error.what());
	return error.code() == std::errc::operation_not_supported ? 77 : 1;
}
