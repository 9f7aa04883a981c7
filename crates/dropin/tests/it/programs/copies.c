/* Two copies of a library in one process, each used by a plug-in that was loaded with RTLD_LOCAL.
 *
 * copies PLUGIN PLUGIN
 *
 * Prints "own" for each plug-in whose calls reached its own copy, "other" if not. */
#include <dlfcn.h>
#include <stdio.h>

int main(int count, char **words)
{
    int (*use[2])(void);
    if (count != 3)
        return 2;
    for (int i = 0; i < 2; i++) {
        void *plugin = dlopen(words[i + 1], RTLD_NOW | RTLD_LOCAL);
        use[i] = plugin ? (int (*)(void))dlsym(plugin, "use") : NULL;
        if (!use[i]) {
            fprintf(stderr, "%s\n", dlerror());
            return 2;
        }
    }
    puts(use[0]() ? "own" : "other");
    puts(use[1]() ? "own" : "other");
    return 0;
}
