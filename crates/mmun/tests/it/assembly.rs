//! Programs in C with instructions of their processor.

/// Calls `munmap` with stack pointers that point nowhere.
pub(crate) const STACK_ANYWHERE: &str = "\
int main(void) {
    static const unsigned long values[] = { 0, 1, 8, 4095, 0x7fffffffefffUL, 0x7ffffffff000UL, 1UL << 47, 1UL << 63,
                                            ~0UL, ~7UL, ~4095UL };
    for (int i = 0; i < sizeof values / sizeof *values; i++) {
#ifdef __aarch64__
        register long result __asm__(\"x0\") = (long)make(PROT_READ);
        register long size __asm__(\"x1\") = SIZE, number __asm__(\"x8\") = 215;
        __asm__ volatile(\"mov x9, sp; mov x10, x29; mov sp, %3; mov x29, %3; svc #0;\"
                         \"mov sp, x9; mov x29, x10\"
                         : \"+r\"(result) : \"r\"(size), \"r\"(number), \"r\"(values[i])
                         : \"x9\", \"x10\", \"memory\");
#else
        register char *at __asm__(\"rdi\") = make(PROT_READ);
        register long size __asm__(\"rsi\") = SIZE;
        long result;
        __asm__ volatile(\"mov %%rsp, %%r12; mov %%rbp, %%r13; mov %4, %%rsp; mov %4, %%rbp; syscall;\"
                         \"mov %%r12, %%rsp; mov %%r13, %%rbp\"
                         : \"=a\"(result) : \"a\"(11L), \"r\"(at), \"r\"(size), \"d\"(values[i])
                         : \"rcx\", \"r11\", \"r12\", \"r13\", \"memory\");
#endif
        if (result) return 1;
    }
    return give_back(make(PROT_READ));
}
";

/// Calls `munmap` on its own text, then once more, from memory without a file.
pub(crate) const UNMAPS_ITS_TEXT: &str = "\
extern char __executable_start, etext;
int main(void) {
    /* munmap twice, then exit_group(0) */
#ifdef __aarch64__
    static const unsigned code[] = {
        0xd2801ae8, 0xd4000001, 0xaa1303e0, 0xaa1403e1, 0xd2801ae8, 0xd4000001,
        0xd2800000, 0xd2800bc8, 0xd4000001 };
#else
    static const unsigned char code[] = {
        0xb8, 11, 0, 0, 0, 0x0f, 0x05, 0x4c, 0x89, 0xe7, 0x4c, 0x89, 0xee, 0xb8, 11, 0, 0, 0, 0x0f, 0x05,
        0x31, 0xff, 0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05 };
#endif
    char *jit = make(PROT_READ | PROT_WRITE | PROT_EXEC), *begin = &__executable_start;
    memcpy(jit, code, sizeof code);
#ifdef __aarch64__
    __builtin___clear_cache(jit, jit + sizeof code);
    register char *first __asm__(\"x0\"), *other __asm__(\"x19\") = make(PROT_READ);
    register long length __asm__(\"x1\") = &etext - begin, size __asm__(\"x20\") = SIZE;
    first = begin;
    __asm__ volatile(\"br %0\" : : \"r\"(jit), \"r\"(first), \"r\"(length), \"r\"(other), \"r\"(size));
#else
    register char *other __asm__(\"r12\") = make(PROT_READ);
    register long size __asm__(\"r13\") = SIZE;
    __asm__ volatile(\"jmp *%0\" : : \"r\"(jit), \"D\"(begin), \"S\"((&etext - begin + 4095) & ~4095L),
                     \"r\"(other), \"r\"(size));
#endif
    return 1;
}
";
