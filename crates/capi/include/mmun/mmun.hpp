// SPDX-License-Identifier: MIT OR Apache-2.0
//
// mmun/mmun.h for C++11 and later: handles with destructors, errors as exceptions, callbacks as
// objects. Header only. The rules of mmun/mmun.h hold here as well.
//
//	mmu::Sources mmun;				// Throws mmu::Error.
//	mmu::Watch watch(mmun, buffer, length);
//	if (watch.valid())
//		transfer(key);
//
// Handles can be moved and not copied. Destructors do not throw.
#ifndef MMUN_MMUN_HPP
#define MMUN_MMUN_HPP

#include <mmun/mmun.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace mmu {

// An error of the library. code().value() is an errno; what() is mmun_last_error().
class Error : public std::system_error {
public:
	explicit Error(int error) : std::system_error(-error, std::generic_category()), text_(mmun_last_error()) {}
	const char *what() const noexcept override { return text_.what(); }

private:
	std::runtime_error text_; // A string whose copies cannot throw.
};

namespace detail {

inline void check(int result)
{
	if (result < 0)
		throw Error(result);
}

// For destructors, which cannot throw: ends the process if a handle may not be closed here.
inline void must(int result, const char *what) noexcept
{
	if (result < 0) {
		std::fprintf(stderr, "libmmun: %s: %s\n", what, mmun_last_error());
		std::abort();
	}
}

struct Close {
	void operator()(struct mmun *handle) const noexcept { mmun_close(handle); }
	void operator()(struct mmun_watch *handle) const noexcept { mmun_unwatch(handle); }
	void operator()(struct mmun_regcache *handle) const noexcept
	{
		must(mmun_regcache_close(handle), "mmu::RegCache is destroyed");
	}
};

} // namespace detail

// The event sources of this process.
class Sources {
public:
	// Starts those of `sources` that work here (0: hook and kernel), and all of `required`.
	// Throws if one of `required` does not work, or if no source works.
	explicit Sources(std::uint32_t sources = 0, std::uint32_t required = 0)
	{
		const struct mmun_options options = {sizeof(options), sources, required};
		struct mmun *opened;

		detail::check(mmun_open(&options, &opened));
		handle_.reset(opened);
	}

	struct mmun_status status() const
	{
		struct mmun_status status = {};

		status.size = sizeof(status);
		detail::check(mmun_status(get(), &status));
		return status;
	}

	// Runs the callbacks of all changes that began before the call, or waits until another
	// thread has run them.
	void settle() const { detail::check(mmun_settle(get())); }

	// Fills a cache that has a subscription. `make` runs without the lock: it registers the
	// memory and returns an object whose destructor deregisters it. `enter` runs under `mutex`:
	// it gets the object by move and publishes it. If a change raced with the registration, the
	// object is destroyed without the lock and `make` runs again.
	//
	// The subscription's `start` must take `mutex` as well, and may run in the middle of
	// free(). So no thread may allocate while it holds `mutex`: `enter` must write to memory
	// that was allocated before.
	template <class Mutex, class Make, class Enter> void fill(Mutex &mutex, Make make, Enter enter) const
	{
		for (;;) {
			const std::uint64_t seq = mmun_fill_begin(get());

			if (seq == 0)
				throw Error(status().inherited ? -ESRCH : -EDEADLK);
			auto made = make();
			const std::lock_guard<Mutex> guard(mutex);

			if (!mmun_fill_retry(get(), seq)) {
				enter(std::move(made));
				return;
			}
		}
	}

	struct mmun *get() const noexcept { return handle_.get(); }

private:
	std::unique_ptr<struct mmun, detail::Close> handle_;
};

// A range, and whether its memory has changed since the watch was made or renewed.
class Watch {
public:
	Watch(const Sources &mmun, const void *address, std::size_t length)
	{
		struct mmun_watch *watch;

		detail::check(mmun_watch(mmun.get(), address, length, &watch));
		handle_.reset(watch);
	}

	bool valid() const noexcept { return mmun_watch_valid(handle_.get()); }
	void renew() { detail::check(mmun_watch_renew(handle_.get())); }

private:
	std::unique_ptr<struct mmun_watch, detail::Close> handle_;
};

// Calls start(change) and end(change) of an object for every change. The destructor waits until
// neither of them runs. The destructor must not run in a callback, where it would wait for itself:
// it ends the process.
template <class Subscriber> class Subscription {
public:
	template <class... Arguments>
	explicit Subscription(const Sources &mmun, Arguments &&...arguments)
	    : subscriber_(new Subscriber(std::forward<Arguments>(arguments)...))
	{
		const struct mmun_ops ops = {sizeof(ops), start, end};

		detail::check(mmun_subscribe(mmun.get(), &ops, subscriber_.get(), &handle_));
	}

	Subscription(Subscription &&other) noexcept
	    : subscriber_(std::move(other.subscriber_)), handle_(other.handle_)
	{
		other.handle_ = nullptr;
	}

	Subscription(const Subscription &) = delete;
	Subscription &operator=(const Subscription &) = delete;

	~Subscription()
	{
		if (handle_)
			detail::must(mmun_unsubscribe(handle_), "mmu::Subscription is destroyed");
	}

	Subscriber &operator*() const noexcept { return *subscriber_; }
	Subscriber *operator->() const noexcept { return subscriber_.get(); }

private:
	static void start(void *context, const struct mmun_change *change)
	{
		static_cast<Subscriber *>(context)->start(*change);
	}

	static void end(void *context, const struct mmun_change *change)
	{
		static_cast<Subscriber *>(context)->end(*change);
	}

	std::unique_ptr<Subscriber> subscriber_;
	struct mmun_subscription *handle_ = nullptr;
};

class RegCache;

// A lease of a region, which stays registered until the lease is destroyed.
class Lease {
public:
	Lease(Lease &&other) noexcept : lease_(other.lease_), held_(other.held_) { other.held_ = false; }
	Lease &operator=(Lease &&other) noexcept
	{
		std::swap(lease_, other.lease_);
		std::swap(held_, other.held_);
		return *this;
	}
	Lease(const Lease &) = delete;
	Lease &operator=(const Lease &) = delete;
	~Lease()
	{
		if (held_)
			mmun_regcache_put(&lease_);
	}

	void *handle() const noexcept { return lease_.handle; }
	// See mmun_lease_valid(). A result of false does not prove a bug in the program.
	bool valid() const noexcept { return held_ && mmun_lease_valid(&lease_); }

private:
	friend class RegCache;
	explicit Lease(const struct mmun_lease &lease) noexcept : lease_(lease), held_(true) {}

	struct mmun_lease lease_;
	bool held_;
};

// A registration cache over the functions of a registrar. Destroy the leases first: the destructor
// ends the process if a lease is left.
class RegCache {
public:
	RegCache(const Sources &mmun, const struct mmun_registrar &registrar,
		 const struct mmun_regcache_options *options = nullptr)
	{
		struct mmun_regcache *cache;

		detail::check(mmun_regcache_open(mmun.get(), &registrar, options, &cache));
		handle_.reset(cache);
	}

	Lease lease(void *address, std::size_t length) const
	{
		struct mmun_lease lease;

		detail::check(mmun_regcache_get(handle_.get(), address, length, &lease));
		return Lease(lease);
	}

	std::uint64_t flush() const noexcept { return mmun_regcache_flush(handle_.get()); }

	struct mmun_regcache_stats stats() const
	{
		struct mmun_regcache_stats stats = {};

		stats.size = sizeof(stats);
		detail::check(mmun_regcache_stats(handle_.get(), &stats));
		return stats;
	}

private:
	std::unique_ptr<struct mmun_regcache, detail::Close> handle_;
};

} // namespace mmu

#endif
