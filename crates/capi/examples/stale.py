"""A cache keyed by address serves stale entries; a cache with watches does not. Argument: the library's path."""
import ctypes, mmap, sys

lib = ctypes.CDLL(sys.argv[1])
lib.mmun_last_error.restype = ctypes.c_char_p
lib.mmun_watch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
lib.mmun_watch_valid.argtypes, lib.mmun_watch_valid.restype = [ctypes.c_void_p], ctypes.c_bool
mmun = ctypes.c_void_p()
if lib.mmun_open(None, ctypes.byref(mmun)) < 0:
    print("SKIP", lib.mmun_last_error().decode(), file=sys.stderr)
    sys.exit(77)

def send(buffer, cache, watches):
    """Returns the message that the device would send: the content of the buffer when it was registered."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    if watches is not None and not lib.mmun_watch_valid(watches.get(address)):
        watches[address] = watch = ctypes.c_void_p()
        assert lib.mmun_watch(mmun, address, len(buffer), ctypes.byref(watch)) == 0
        cache.pop(address, None)
    return cache.setdefault(address, bytes(buffer[:5]))

for name, cache, watches in [("without", {}, None), ("with", {}, {})]:
    stale = 0
    for message in (b"first", b"other") * 50:
        buffer = mmap.mmap(-1, 1 << 20)  # Replacing the buffer unmaps it: the next mapping gets its address.
        buffer[:5] = message
        stale += send(buffer, cache, watches) != message
        buffer = None
    print(f"{name} watches: {stale} of 100 stale")
    assert (stale == 0) == (name == "with")
