/* Prints which kinds of membarrier this process is registered for, or -1 if the kernel does not say
 * (before Linux 6.3). */
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void)
{
    enum { GET_REGISTRATIONS = 1 << 9 };
    printf("%ld\n", syscall(SYS_membarrier, GET_REGISTRATIONS, 0, 0));
    return 0;
}
