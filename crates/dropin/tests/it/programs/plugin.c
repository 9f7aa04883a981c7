/* A plugin that uses a library as it is loaded. */
void first_use(void);
__attribute__((constructor)) static void begin(void) { first_use(); }
